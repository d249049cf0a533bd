"""The sizes that CONTRIBUTING.md states are those the code has."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "src").rglob("*.py"))


def functions() -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


def share_within(sizes: list[int], most: int) -> float:
    return sum(size <= most for size in sizes) / len(sizes)


def test_functions_are_as_short_as_stated() -> None:
    sizes = [(node.end_lineno or 0) - node.lineno + 1 for node in functions()]
    assert share_within(sizes, 7) >= 0.5
    assert share_within(sizes, 20) >= 0.9
    assert share_within(sizes, 30) >= 1 - 1 / 40


def test_files_are_as_short_as_stated() -> None:
    sizes = [file.read_text().count("\n") for file in FILES]
    assert share_within(sizes, 210) >= 0.9
    assert max(sizes) <= 310
