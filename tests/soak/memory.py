"""Whether a server's memory stays where it is."""

from __future__ import annotations

import threading
from contextlib import suppress
from statistics import median

import psutil

from tests.soak.server import Supervised

EVERY_S = 2.0
MIB = 1 << 20
SLACK_BYTES = 24 * MIB
SLACK_SHARE = 0.05
"""What allocators keep of short peaks, of all that a process has."""


class Memory:
    """Samples the proportional share of each process, by what the process is."""

    def __init__(self, server: Supervised) -> None:
        self._server, self._over = server, threading.Event()
        self._samples: dict[tuple[int, str], list[int]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(EVERY_S):
            for process in self._server.tree():
                with suppress(psutil.Error):
                    key = (process.pid, process.name())
                    self._samples.setdefault(key, []).append(process.memory_info().rss)

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def growth(self) -> dict[str, tuple[float, float]]:
        """Name -> MiB in the second and in the last quarter of the samples, of the processes that
        were there all the time. Caches and pools fill in the first."""
        most = max(map(len, self._samples.values()), default=0)
        found = {}
        for (pid, name), samples in self._samples.items():
            if len(samples) > 0.8 * most:
                quarter = len(samples) // 4
                early = median(samples[quarter : 2 * quarter])
                found[f"{name} {pid}"] = (early / MIB, median(samples[3 * quarter :]) / MIB)
        return found

    def leaking(self) -> dict[str, tuple[float, float]]:
        """Those that grew by more than allocators explain, while the load stayed the same."""
        return {
            name: (early, late)
            for name, (early, late) in self.growth().items()
            if (late - early) * MIB > SLACK_BYTES + SLACK_SHARE * early * MIB
        }
