"""How many lines may be in flight: enough to fill the engine, fewer when it pushes back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

FIRST = 16
BACKOFF = 0.5
# One overload answers many requests at once; it halves the window once.
HOLD_S = 1.0


class InFlightWindow:
    """Additive increase, multiplicative decrease, between 1 and `most`.

    An engine that gives everything to online work finishes no line, so the window neither grows
    nor refills; one that refuses a line halves it.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._most = most
        self._limit = float(min(FIRST, most))
        self._held_until_s = -math.inf

    @property
    def limit(self) -> int:
        return int(self._limit)

    def on_result(self) -> None:
        self._limit = min(float(self._most), self._limit + 1.0)

    def on_overload(self) -> None:
        now_s = self._clock()
        if now_s < self._held_until_s:
            return
        self._held_until_s = now_s + HOLD_S
        self._limit = max(1.0, self._limit * BACKOFF)


def retry_delay_s(attempts: int) -> float:
    """Seconds before try number `attempts` + 1: 1, 2, 4, ... up to a minute."""
    return float(min(60, 2 ** min(attempts, 6)))
