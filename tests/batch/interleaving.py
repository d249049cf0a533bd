"""Two workers on one PostgreSQL, one statement at a time, in an order that a test chooses.

Each worker stops before every statement and every commit. A turn lets one of them do its next; the
turn is over when everybody has stopped again, ended, or waits for a lock that another holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, repeat
from typing import Any

import asyncpg
from sqlalchemy import event
from sqlalchemy.util import await_only

from conserve.batch.stores import Stores

LOOK_S = 0.002
MANY_TURNS = 100

Work = Callable[[], Awaitable[Any]]


class Player:
    """One worker with connections of its own. What it does while nobody plays is not held up."""

    def __init__(self, stores: Stores) -> None:
        self.stores = stores
        self.num_stops = 0
        self._pid = 0
        self._plays = self._ended = False
        self._stopped = asyncio.Event()
        self._quiet = asyncio.Event()
        self._go = asyncio.Event()
        self._task: asyncio.Task[Any] | None = None
        engine = stores.database._engine.sync_engine
        event.listen(engine, "before_cursor_execute", self._before_statement)
        event.listen(engine, "commit", self._stop)

    def _before_statement(self, connection: Any, *_: Any) -> None:
        self._stop(connection)

    def _stop(self, connection: Any) -> None:
        if self._plays:
            self._pid = connection.connection.driver_connection.get_server_pid()
            await_only(self._wait())

    async def _wait(self) -> None:
        self.num_stops += 1
        self._stopped.set()
        self._quiet.set()
        await self._go.wait()
        self._go.clear()

    def begin(self, work: Work) -> None:
        async def play() -> Any:
            try:
                return await work()
            except Exception as error:
                return error
            finally:
                self._plays = False
                self._ended = True
                self._quiet.set()

        self.num_stops, self._plays, self._ended = 0, True, False
        self._stopped.clear()
        self._quiet.clear()
        self._task = asyncio.create_task(play())

    def go(self) -> None:
        self._stopped.clear()
        self._quiet.clear()
        self._go.set()

    @property
    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    @property
    def has_ended(self) -> bool:
        return self._ended

    async def result(self) -> Any:
        """What the work came to, or what it raised."""
        assert self._task is not None
        return await self._task

    async def settle(self, looker: asyncpg.Connection) -> None:
        """Until it has stopped, has ended, or waits for a lock."""
        query = "SELECT cardinality(pg_blocking_pids($1)) > 0"
        while not self._quiet.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._quiet.wait()
                    return
            if self._pid and await looker.fetchval(query, self._pid):
                return


class Interleaving:
    def __init__(self, players: Sequence[Player], looker: asyncpg.Connection) -> None:
        self.players = players
        self._looker = looker

    async def play(self, works: Sequence[Work], turns: Sequence[int]) -> list[Any]:
        """What each work came to. `turns`: whose turn it is, by number; after them the first goes
        to its end, then the second. A turn of one that cannot go is the other's."""
        for player, work in zip(self.players, works, strict=True):
            player.begin(work)
        await self._settle()
        for turn in chain(turns, repeat(0)):
            able = [player for player in self.players if player.is_stopped]
            if not able:
                if all(player.has_ended for player in self.players):
                    break
                await asyncio.sleep(LOOK_S)  # a deadlock, which the database will end
            else:
                wanted = self.players[turn]
                (wanted if wanted in able else able[0]).go()
            await self._settle()
        return [await player.result() for player in self.players]

    async def _settle(self) -> None:
        for player in self.players:
            await player.settle(self._looker)


def two_switches(num_first: int, num_second: int) -> Iterator[list[int]]:
    """Every order that switches twice at most before one of two workers has ended: the first does
    some, the second some, the first the rest."""
    for first in range(num_first + 1):
        for second in range(num_second + 1):
            yield [0] * first + [1] * second


def one_switch(num_first: int, num_second: int) -> Iterator[list[int]]:
    """Every order in which one of two workers does all of its own amid the other's."""
    for first in range(num_first + 1):
        yield [0] * first + [1] * MANY_TURNS
    for second in range(num_second + 1):
        yield [1] * second + [0] * MANY_TURNS
