"""One process's count of its online and flex requests, on its way to the database.

Nobody waits for the database: counts gather here, and `save` writes what they have come to. The
writer's rows hold totals of its day, so a try whose outcome nobody knows (the connection broke
while it was committed) is simply made again. They are written until the day after at most, and
added up by `UsageStore.tidy` only then.
"""

from __future__ import annotations

from conserve.batch.usage_store import Billed, Counts, UsageStore


class UsageLedger:
    def __init__(self, store: UsageStore, writer: str) -> None:
        """`writer`: a name that no other process has, and this one had in no earlier life."""
        self._store = store
        self._writer = writer
        self._day = store.today
        self._num_days = 1
        self._saved: dict[Billed, Counts] = {}
        """Of this day."""
        self._waiting: dict[Billed, Counts] = {}
        self._is_in_doubt = False
        """Whether the last try failed, and may have been committed nevertheless."""

    def add(self, billed: Billed, counts: Counts) -> None:
        self._waiting[billed] = self._waiting.get(billed, Counts()) + counts

    @property
    def num_waiting(self) -> int:
        """Requests that have ended, and of which the database knows nothing."""
        return sum(counts.completed + counts.failed for counts in self._waiting.values())

    async def save(self) -> None:
        """Write what waits, to be called by one task at a time. Raises StoreUnavailableError: it
        waits on, for the next try."""
        if not self._waiting:
            return
        self._turn_day()
        writing, self._waiting = self._waiting, {}
        totals = {name: self._saved.get(name, Counts()) + more for name, more in writing.items()}
        try:
            await self._store.put(f"{self._writer}-{self._num_days}", self._day, totals)
        except BaseException:  # a cancelled try, too
            self._is_in_doubt = True
            for name, more in writing.items():
                self.add(name, more)
            raise
        self._is_in_doubt = False
        self._saved |= totals

    def _turn_day(self) -> None:
        """What waits is counted on the day it is saved; what is in doubt, on the day of that try,
        as long as its rows are this writer's. Each day has a writer of its own: a clock that is set
        back leads to a day of which the totals are not known any more."""
        passed = self._store.today - self._day
        if passed and (not self._is_in_doubt or abs(passed) > 1):
            self._day = self._store.today
            self._num_days += 1
            self._saved.clear()
