"""The model: what it is, and which of our mechanisms it has, asked in a process of its own, where
what vLLM leaves behind and what it logs disturb nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from conserve.engine.versions import installed
from conserve.server.doctor.finding import Finding

SECTION = "model"
LIMIT_S = 600.0
WHY_OFF = "Nothing, if that is meant; docs/models.md says what works with which model."
NOT_TRIED = "Start `conserve serve` with the same words, whose log says more."


def model(words: Sequence[str]) -> Iterator[Finding]:
    """words: of `conserve serve`, MODEL first."""
    if installed() is None:
        yield Finding(SECTION, "model", "not looked at: there is no vLLM here")
        return
    told = _asked(words)
    if refusal := told.get("refused"):
        yield Finding.problem(SECTION, "start", refusal, "Correct the flag or name that it names.")
        return
    if failure := told.get("failed"):
        yield Finding.warning(SECTION, "model", f"not looked at: {failure}", NOT_TRIED)
        return
    for name, text in [*told["facts"], *told["lines"]]:
        yield Finding(SECTION, name, text)
    for name, text, is_on in told["abilities"]:
        if is_on:
            yield Finding.ok(SECTION, name, text)
        else:
            yield Finding.warning(SECTION, name, text, WHY_OFF)


def _asked(words: Sequence[str]) -> dict[str, Any]:
    """What `model_process` says; `failed` where it says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "told.json"
        command = [sys.executable, "-m", "conserve.server.doctor.model_process", str(out), *words]
        environ = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=environ
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"no answer within {LIMIT_S:g} s"}
        if done.returncode or not out.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines()
            return {"failed": lines[-1] if lines else f"exit status {done.returncode}"}
        told: dict[str, Any] = json.loads(out.read_text())
        return told
