"""One worker's harvest, counted as its results are stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from conserve.batch.harvest_store import HarvestStore
from conserve.batch.outcome import Result, Tokens

# The database is told no more often.
EVERY_S = 1.0


class HarvestMeter:
    """Raises StoreUnavailableError."""

    def __init__(
        self, worker_id: str, store: HarvestStore, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._worker_id = worker_id
        self._store = store
        self._clock = clock
        self._busy_since: float | None = None
        self._uncounted: list[Result] = []

    def start(self) -> None:
        """A line is in flight: from here the worker is busy."""
        if self._busy_since is None:
            self._busy_since = self._clock()

    async def count(self, stored: Iterable[Result], *, is_busy: bool) -> None:
        """Add results that were stored; `is_busy` while more lines are in flight."""
        now = self._clock()
        self._uncounted += stored
        if self._busy_since is None or (is_busy and now < self._busy_since + EVERY_S):
            return
        tokens = sum((result.tokens for result in self._uncounted), Tokens())
        num_requests, busy_s = len(self._uncounted), now - self._busy_since
        self._uncounted = []
        self._busy_since = now if is_busy else None
        await self._store.add(self._worker_id, num_requests, tokens, busy_s)
