"""Every program has a row in the table and a test that runs it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.examples.conftest import EXAMPLES

README = (EXAMPLES / "README.md").read_text()
PROGRAMS = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".ipynb"})
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
MOST_LINES = 80


def test_the_table_has_them_all() -> None:
    assert sorted(re.findall(r"^\| \[([\w.]+)\]\(\1\) \|", README, re.MULTILINE)) == PROGRAMS


def test_each_is_run() -> None:
    run = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in PROGRAMS if f'"{name}"' not in run] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_each_says_what_it_needs_and_is_short(path: Path) -> None:
    told = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert "\nNeeds " in told
    assert f"python examples/{path.name}" in told
    assert path.read_text().count("\n") <= MOST_LINES
