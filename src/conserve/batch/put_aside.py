"""Batches whose input cannot be read are left alone for a while, and the others go on."""

from __future__ import annotations

import time
from collections.abc import Callable

ASIDE_S = 5.0


class PutAside:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until_s: dict[str, float] = {}

    def add(self, batch_id: str) -> None:
        self._until_s[batch_id] = self._clock() + ASIDE_S

    def batches(self) -> set[str]:
        """Those that are to be left alone at this moment."""
        now_s = self._clock()
        self._until_s = {name: until for name, until in self._until_s.items() if until > now_s}
        return set(self._until_s)
