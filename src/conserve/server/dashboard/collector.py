"""One look a second at the server's own series, and what everybody who watches is told of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from conserve.batch.outage import Outage
from conserve.server.dashboard.events import Events
from conserve.server.dashboard.history import History
from conserve.server.dashboard.messages import Facts, Summary
from conserve.server.dashboard.status import Status
from conserve.server.dashboard.summary import summarise
from conserve.server.series import Reading, Registry, change, read

logger = logging.getLogger(__name__)

EVERY_S = 1.0
MOST_COST = 0.005
"""Share of one CPU that looking may take; a look that costs more is taken less often."""


class Collector:
    """`look` takes a reading; `run` does so until it is cancelled. Readers wait with `changed`."""

    def __init__(
        self, registry: Registry, facts: Facts, status: Status, clock: Callable[[], float]
    ) -> None:
        self.facts = facts
        self.status = status
        self.summary: Summary | None = None
        """None before the first look."""
        self.events = Events()
        self.history = History()
        self.num_looks = 0
        self._registry = registry
        self._clock = clock
        self._last: Reading | None = None
        self._new = asyncio.Condition()
        self._outage = Outage(logger, "the dashboard's look at the figures failed")

    async def run(self) -> None:
        self.events.say(self._clock(), "server", f"Server ready with {self.facts.model}.")
        while True:
            began_s = time.monotonic()
            cost_s = 0.0
            with self._outage.survived():
                cost_s = await self.look()
            every_s = max(EVERY_S, cost_s / MOST_COST)
            await asyncio.sleep(max(0.0, every_s - (time.monotonic() - began_s)))

    async def look(self) -> float:
        """Take a reading, and wake whoever waits. Returns the seconds of CPU time it took."""
        reading, cost_s = await asyncio.to_thread(self._read)
        began_s = time.thread_time()
        self._take(reading)
        cost_s += time.thread_time() - began_s
        async with self._new:
            self.num_looks += 1
            self._new.notify_all()
        return cost_s

    async def changed(self, seen: int, limit_s: float) -> int:
        """`num_looks`, once it is above `seen`, or after `limit_s` as it is."""
        try:
            async with asyncio.timeout(limit_s), self._new:
                await self._new.wait_for(lambda: self.num_looks > seen)
        except TimeoutError:
            pass
        return self.num_looks

    def _read(self) -> tuple[Reading, float]:
        began_s = time.thread_time()
        return read(self._registry, self._clock()), time.thread_time() - began_s

    def _take(self, reading: Reading) -> None:
        if self._last is not None and reading.time_s > self._last.time_s:
            one = change(self._last, reading)
            self.history.add(one)
            self.events.add(one)
        self._last = reading
        self.summary = summarise(reading, self.history, self.facts, self.status)
        chat = self.summary.chat
        if chat.state in ("late", "safe"):
            self.events.judge(reading.time_s, chat.state == "late", chat.event)
