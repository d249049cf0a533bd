"""Tests of this project against a vLLM that is not installed: its files come first on Python's
path, everything else is the environment's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conserve.engine.versions import VARIABLE

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_ENGINE = (
    "tests/engine", "tests/contract", "tests/server",
    "-m", "engine and not server and not long and not matrix",
)  # fmt: skip
"""Scheduler, KV manager, connector, copies, routes, signatures and flags: everything that imports
vLLM and starts no engine."""
WITH_ENGINE = ("tests/stops/test_real_engine.py", "-m", "engine and not long and not matrix")
"""A short run on a real engine: stops, copies and displacement, and answers as without them."""
LIMIT_S = 3600.0


@dataclass
class Outcome:
    """What came of some tests."""

    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    """A line each: which, and the first line of why."""


def run(folder: Path, tests: Sequence[str]) -> Outcome:
    """Run those tests with that folder before all others on Python's path."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", *tests]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(folder), timeout=LIMIT_S, check=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if not report.exists():
            said = done.stderr.strip().splitlines()
            return Outcome(failed=[f"no test has run: {said[-1] if said else 'pytest failed'}"])
        return read(ElementTree.parse(report).getroot())


def environment(folder: Path) -> dict[str, str]:
    first = [str(one) for one in (folder, ROOT / "src", ROOT)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(first),
        VARIABLE: "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def read(report: ElementTree.Element) -> Outcome:
    """From pytest's report in JUnit's format."""
    outcome = Outcome()
    for case in report.iter("testcase"):
        if case.find("skipped") is not None:
            outcome.skipped += 1
        elif lines := list(_failures(case)):
            outcome.failed.append(lines[0])
        else:
            outcome.passed += 1
    return outcome


def _failures(case: ElementTree.Element) -> Iterator[str]:
    module = case.get("classname", "").rpartition(".")[2]
    for kind in ("failure", "error"):
        for found in case.iter(kind):
            why = (found.get("message") or found.text or "").strip().splitlines()
            yield f"failed: {module}::{case.get('name')}: {why[0][:200] if why else kind}"
