"""Who had this machine's processors over a span: we, other programs, or the host's other guests.

Read from /proc; where that tells nothing, nothing is said.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
WORKING = (0, 1, 2, 5, 6)
"""Columns of a CPU's line in /proc/stat: user, nice, system, irq, softirq."""
STEAL = 7
PARENT, USER, SYSTEM = 1, 11, 12
"""Fields of /proc/PID/stat behind the name: the parent, and ticks spent in both modes."""


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds since the machine started, summed over the processors we may use.

    working: any program ran. own: ours did. stolen: the host ran another guest.
    """

    working: float
    own: float
    stolen: float


@dataclass(frozen=True, slots=True)
class Taken:
    """Shares of the processors' time over a span that were not ours to use."""

    others: float = 0.0
    stolen: float = 0.0

    @property
    def share(self) -> float:
        return self.others + self.stolen


NOTHING = Taken()


def read_cpu_times(proc: Path = PROC) -> CpuTimes | None:
    """The times as they stand; ours are this process's and those of all that descend from it."""
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    try:
        lines = [line.split() for line in (proc / "stat").read_text().splitlines()]
        ours = {f"cpu{i}" for i in os.sched_getaffinity(0)}
        columns = [[int(word) for word in line[1:]] for line in lines if line[0] in ours]
        working = sum(row[i] for row in columns for i in WORKING)
        stolen = sum(row[STEAL] for row in columns)
    except (OSError, ValueError, IndexError):
        return None
    return CpuTimes(working * tick_s, _own_ticks(proc) * tick_s, stolen * tick_s)


def taken(before: CpuTimes | None, after: CpuTimes | None, seconds: float) -> Taken:
    """What others took between two readings `seconds` apart; nothing where one is missing."""
    if before is None or after is None or seconds <= 0:
        return NOTHING
    whole_s = seconds * len(os.sched_getaffinity(0))
    others_s = (after.working - before.working) - (after.own - before.own)
    stolen_s = after.stolen - before.stolen
    return Taken(max(0.0, others_s / whole_s), max(0.0, stolen_s / whole_s))


def _own_ticks(proc: Path) -> int:
    children, ticks = defaultdict(list), {}
    for stat in proc.glob("[0-9]*/stat"):
        try:
            # A program's name may hold spaces and brackets.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        pid = int(stat.parent.name)
        children[int(fields[PARENT])].append(pid)
        ticks[pid] = int(fields[USER]) + int(fields[SYSTEM])
    total, ours = 0, [os.getpid()]
    while ours:
        pid = ours.pop()
        total += ticks.get(pid, 0)
        ours += children[pid]
    return total
