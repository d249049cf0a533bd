"""Every program has a row in the table and a test that runs it."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts.installed import normal
from tests.dist.bare import closure
from tests.examples.conftest import EXAMPLES
from tests.test_dependencies import OWNERS, imports

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


def lacking(program: str) -> set[str]:
    """Modules that none of the packages brings which its first words say to install."""
    told = ast.get_docstring(ast.parse(program)) or ""
    words = [
        word for line in re.findall(r"`pip install ([^`]+)`", told) for word in shlex.split(line)
    ]
    there = closure([Requirement(word) for word in words]).keys()
    return {name for name in imports(program) if not there & set(map(normal, OWNERS[name]))}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_it_says_to_install_is_what_it_imports(path: Path) -> None:
    program = path.read_text()
    if "vLLM, which comes with ConServe" in program:
        pytest.skip("it runs where the server does")
    assert lacking(program) == set()


def test_a_package_that_is_not_named_is_noticed() -> None:
    program = '"""Needs `pip install httpx`."""\nimport json, httpx\nfrom openai import OpenAI\n'
    assert lacking(program) == {"openai"}
