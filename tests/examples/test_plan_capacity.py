"""The notebook runs from its first cell to its last, and its answer follows from its table."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.examples.conftest import EXAMPLES
from tests.waiting import LIMIT_S

NOTEBOOK = EXAMPLES / "plan_capacity.ipynb"
ROW = re.compile(r"^(\d): ([\d.]+)% of chats within targets, summaries (.+)$", re.MULTILINE)


def test_it_plans(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=int(LIMIT_S), resources=place).execute()
    told = "".join(output.text for output in notebook.cells[-1].outputs)
    rows = {int(n): (float(met), end) for n, met, end in ROW.findall(told)}
    assert list(rows) == [1, 2, 3, 4]
    enough = [n for n, (met, end) in rows.items() if met >= 99 and end != "not in time"]
    assert rows[1][1] == "not in time"
    assert f"replicas needed: {enough[0]}" in told


def test_it_is_kept_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not any(cell.get("outputs") for cell in cells)
