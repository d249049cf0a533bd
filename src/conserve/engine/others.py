"""How much of the processors everybody else has, while we measure."""

from __future__ import annotations

import os
import time

import psutil


class OthersShare:
    """Begins to look when it is made. Linux; the processors this process may run on."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._started_s = time.monotonic()
        self._begin = self._busy_s(), self._own_s()

    def since_start(self) -> float:
        """The share, 0 to 1, of these processors' time that went to processes other than this one
        and its children, or to other guests of the same host (steal)."""
        elapsed_s = (time.monotonic() - self._started_s) * len(os.sched_getaffinity(0))
        busy_s, own_s = self._begin
        others_s = (self._busy_s() - busy_s) - (self._own_s() - own_s)
        return min(1.0, max(0.0, others_s / elapsed_s)) if elapsed_s > 0 else 0.0

    def _busy_s(self) -> float:
        allowed = os.sched_getaffinity(0)
        times = [t for cpu, t in enumerate(psutil.cpu_times(percpu=True)) if cpu in allowed]
        return float(sum(t.user + t.nice + t.system + t.irq + t.softirq + t.steal for t in times))

    def _own_s(self) -> float:
        total_s = 0.0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                spent = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total_s += spent.user + spent.system
        return total_s
