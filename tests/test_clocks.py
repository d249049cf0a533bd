"""Durations are measured with a clock that nobody sets: the wall clock's uses are listed here."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conserve.server.dashboard.steady import steady_clock

SOURCE = Path(__file__).parents[1] / "src" / "conserve"
WALL = {
    "batch/contents.py": "the age of a file, which the file system stamps",
    "batch/presence.py": "the age of a lock file, which the file system stamps",
    "batch/service.py": "dates that clients are told, and leases that several machines share",
    "cli/owners.py": "the store's dates",
    "cli/sim.py": "the date of a report",
    "bench/runner.py": "the date of a report",
    "engine/scheduler.py": "what vLLM stamps its requests with",
    "server/batches/middleware.py": "the batches' dates",
    "server/batches/routes.py": "the batches' dates",
    "server/dashboard/steady.py": "the time of day when the server started",
    "server/dashboard/terminal.py": "a batch's deadline",
    "server/start/batch_data.py": "the batches' dates",
}
"""File -> what it has the time of day for."""
READS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today"}


def readers(folder: Path) -> Iterator[str]:
    """Files that name the wall clock."""
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        if any(reads_the_wall_clock(node) for node in ast.walk(tree)):
            yield path.relative_to(folder).as_posix()


def reads_the_wall_clock(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom) and node.module == "time":
        return any(name.name in ("time", "time_ns") for name in node.names)
    return isinstance(node, ast.Attribute) and ast.unparse(node) in READS


def test_the_wall_clock_is_read_for_dates_alone() -> None:
    assert set(readers(SOURCE)) == set(WALL)


@pytest.mark.parametrize("line", ["import time; time.time()", "from time import time"])
def test_a_file_that_reads_it_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "careless.py").write_text(line)
    (tmp_path / "careful.py").write_text("import time; time.monotonic()")
    assert list(readers(tmp_path)) == ["careless.py"]


def test_the_pages_clock_goes_on_where_the_wall_clock_is_set_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before_s = time.time()
    clock = steady_clock()
    assert before_s - 1 < clock() < before_s + 60
    monkeypatch.setattr(time, "time", lambda: before_s - 3600)
    seen = [clock(), clock()]
    assert before_s - 1 < seen[0] <= seen[1]
