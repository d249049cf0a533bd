"""What a release and a failed trial of a new vLLM say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.release_notes import notes, section

ROOT = Path(__file__).resolve().parents[1]
CHANGELOG = """# Changelog

## Unreleased

- Later.

## 0.2.0 - 2026-11-27

- A thing.

### Broken

- Another.

## 0.1.0

- First.

## 0.0.9
"""


def test_notes_are_the_section_of_the_tag() -> None:
    assert notes("v0.2.0", "0.2.0", CHANGELOG) == "- A thing.\n\n### Broken\n\n- Another."
    assert section(CHANGELOG, "0.1.0") == "- First."


@pytest.mark.parametrize(
    ("tag", "built", "said"),
    [
        ("0.2.0", "0.2.0", "no tag of a release"),
        ("v0.2", "0.2", "no tag of a release"),
        ("v0.3.0", "0.2.0", "is not v0.2.0"),
        ("v0.3.0", "0.3.0", "nothing below '## 0.3.0'"),
        ("v0.0.9", "0.0.9", "nothing below '## 0.0.9'"),
        ("v0.2.0rc1", "0.2.0rc1", "nothing below '## 0.2.0rc1'"),
    ],
)
def test_a_tag_that_fits_nothing_is_refused(tag: str, built: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        notes(tag, built, CHANGELOG)


# GitHub's client, as far as it is asked: it keeps what it was called with, and lists one issue.
GH = """#!/usr/bin/env python3
import json, os, subprocess, sys
words = sys.argv[1:]
if words[:2] == ["issue", "list"]:
    found = os.environ["FOUND"]
    query = words[words.index("--jq") + 1]
    if not found.startswith("["):
        sys.exit("gh: cannot reach it")
    sys.exit(subprocess.run(["jq", "--raw-output", query], input=found, text=True).returncode)
body = open(words[words.index("--body-file") + 1]).read()
json.dump([words, body], open(os.environ["KEPT"], "w"))
"""


def tell(tmp_path: Path, report: str, found: str = "[]") -> subprocess.CompletedProcess[str]:
    gh = tmp_path / "gh"
    gh.write_text(GH)
    gh.chmod(0o755)
    (tmp_path / "report.txt").write_text(report)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FOUND": found,
        "KEPT": str(tmp_path / "kept"),
    }
    words = [str(ROOT / "scripts/open_issue.sh"), "It breaks", str(tmp_path / "report.txt"), "URL"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def kept(tmp_path: Path) -> tuple[list[str], str]:
    words, body = json.loads((tmp_path / "kept").read_text())
    return words, body


needs_jq = pytest.mark.skipif(shutil.which("jq") is None, reason="no jq is installed")


@needs_jq
@pytest.mark.parametrize("found", ["[]", '[{"number": 3, "title": "It breaks the other way"}]'])
def test_a_first_failure_opens_an_issue(tmp_path: Path, found: str) -> None:
    done = tell(tmp_path, "all\nis\nlost\n", found)
    assert done.returncode == 0, done.stderr
    words, body = kept(tmp_path)
    assert words[:4] == ["issue", "create", "--title", "It breaks"]
    assert body.startswith("From URL, ")
    assert body.endswith("    all\n    is\n    lost\n")


@needs_jq
def test_the_next_is_said_in_the_open_issue_with_the_end_of_its_report(tmp_path: Path) -> None:
    found = json.dumps([{"number": 3, "title": "x"}, {"number": 7, "title": "It breaks"}])
    done = tell(tmp_path, "line\n" * 500 + "the end\n", found)
    assert done.returncode == 0, done.stderr
    words, body = kept(tmp_path)
    assert words[:3] == ["issue", "comment", "7"]
    assert body.count("line") == 199
    assert body.endswith("    the end\n")


def test_that_it_could_not_be_said_is_a_failure(tmp_path: Path) -> None:
    done = tell(tmp_path, "lost\n", "unreachable")
    assert done.returncode != 0
    assert not (tmp_path / "kept").exists()
