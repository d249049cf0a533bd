"""Whose the processors were, from a made-up /proc."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conserve.metrics.processors import NOTHING, CpuTimes, read_cpu_times, taken

TICKS = os.sysconf("SC_CLK_TCK")
CPUS = sorted(os.sched_getaffinity(0))
SERVER = 4_000_001


def proc(root: Path, *, user: int, steal: int, own: int) -> Path:
    """A machine whose every CPU we may use spent so many seconds in each; a CPU that we may not
    use was busy, too, and so was a program of somebody else's."""
    cpus = [*CPUS, max(CPUS) + 1]
    lines = ["cpu 1 2 3 4 5 6 7 8 0 0"]
    lines += [f"cpu{i} {user * TICKS} 0 0 9999 55 0 0 {steal * TICKS} 0 0" for i in cpus]
    root.mkdir(exist_ok=True)
    (root / "stat").write_text("\n".join([*lines, "intr 12 0"]) + "\n")
    ours = [(os.getpid(), 1, 0), (SERVER, os.getpid(), own), (SERVER + 1, SERVER, own)]
    for pid, parent, seconds in (*ours, (7, 1, 99)):
        (root / str(pid)).mkdir(exist_ok=True)
        ticks = f"{seconds * TICKS} {0}"
        fields = f"S {parent} {pid} {pid} 0 -1 0 0 0 0 0 {ticks} 0 0 20 0"
        (root / str(pid) / "stat").write_text(f"{pid} (a b) c) {fields}\n")
    return root


def test_what_is_not_ours_is_others(tmp_path: Path) -> None:
    before = read_cpu_times(proc(tmp_path, user=100, steal=3, own=10))
    after = read_cpu_times(proc(tmp_path, user=108, steal=4, own=12))
    num_cpus = len(CPUS)
    assert before == CpuTimes(100 * num_cpus, 20, 3 * num_cpus)
    found = taken(before, after, 10.0)
    assert found.others == pytest.approx((8 * num_cpus - 4) / (10 * num_cpus))
    assert found.stolen == pytest.approx(0.1)
    assert found.share == found.others + found.stolen


def test_more_than_all_of_it_is_nothing_taken(tmp_path: Path) -> None:
    """Clocks tick apart: our own time may be read a little later than everybody's."""
    before = read_cpu_times(proc(tmp_path, user=100, steal=0, own=10))
    after = read_cpu_times(proc(tmp_path, user=100, steal=0, own=11))
    assert taken(before, after, 10.0) == NOTHING


@pytest.mark.parametrize("text", ["", "cpu0 one two\n", f"cpu{CPUS[0]} 1 2\n"])
def test_where_nothing_is_known_nothing_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(text)
    found = read_cpu_times(tmp_path)
    assert taken(found, found, 10.0) == NOTHING
    assert read_cpu_times(tmp_path / "nowhere") is None


def test_this_machine_can_be_read() -> None:
    found = read_cpu_times()
    assert found is None or found.working >= 0
