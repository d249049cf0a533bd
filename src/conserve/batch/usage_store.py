"""What each owner's requests came to on each day, by class and model, for bills.

Lines of batches are counted in the transaction that stores their result. Online and flex requests
come from the servers' ledgers (`usage_ledger`). Each writer has rows of its own, so that none waits
for another; `tidy` adds them up when their day has passed. What is counted stays when batches, or
all that an owner has, are deleted or moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import add
from typing import Any, NamedTuple

from msgspec import Struct
from msgspec.structs import asdict, astuple
from sqlalchemy import Table, delete, exists, func, or_, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from conserve.batch.database import Database
from conserve.batch.outcome import Result, Tokens
from conserve.batch.schema import day_usage, usage
from conserve.batch.wire import RequestClass

DAY_S = 86_400
STATEMENT_ROWS = 500
"""Databases bound the parameters of one statement."""
TIDY_AFTER_DAYS = 2
"""A day's rows are added up when no ledger writes to them any more: see `usage_ledger`."""
MODEL_CHARACTERS = 255
"""Of a model's name, how many are kept: it is part of a key."""
NOBODY = ""
"""Writes what others have written, added up."""


class Counts(Struct, frozen=True):
    """Requests by how they ended, and tokens."""

    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(add, astuple(self), astuple(other)))


class Billed(NamedTuple):
    """Whose requests, of which class, of which model."""

    tenant: str
    request_class: RequestClass
    model: str


class DayUsage(NamedTuple):
    """What was billed on one day since the epoch, in UTC."""

    day: int
    billed: Billed
    counts: Counts


_NAMES = ("day", "tenant", "request_class", "model")
_KEY = tuple(day_usage.c[name] for name in _NAMES)
_COUNTS = tuple(day_usage.c[name] for name in Counts.__struct_fields__)


class UsageStore:
    """Raises StoreUnavailableError."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    @property
    def today(self) -> int:
        return int(self._clock() // DAY_S)

    async def count(
        self,
        connection: AsyncConnection,
        writer: str | None,
        tenant: str,
        model: str | None,
        done: Sequence[Result],
    ) -> None:
        """Add a batch's lines that have ended, in the transaction that stores them."""
        tokens = sum((result.tokens for result in done), Tokens())
        failed = sum(result.failed for result in done)
        counts = Counts(
            len(done) - failed, failed, tokens.input, tokens.cached, tokens.output, tokens.reasoning
        )
        found = DayUsage(
            self.today, Billed(tenant, "batch", (model or "")[:MODEL_CHARACTERS]), counts
        )
        await self._write(connection, writer or NOBODY, [found], on_top=True)

    async def put(self, writer: str, day: int, totals: Mapping[Billed, Counts]) -> None:
        """What a ledger has counted of `day` in all: to put the same again changes nothing."""
        found = [DayUsage(day, *each) for each in totals.items()]
        async with self._database.write() as connection:
            await self._write(connection, writer, found, on_top=False)

    async def _write(
        self, connection: AsyncConnection, writer: str, found: Sequence[DayUsage], *, on_top: bool
    ) -> None:
        """`on_top` of what is there, or in place of it."""
        rows = [
            {"writer": writer, "day": day, **billed._asdict(), **asdict(counts)}
            for day, billed, counts in found
        ]
        for start in range(0, len(rows), STATEMENT_ROWS):
            row = self._database.insert(day_usage).values(rows[start : start + STATEMENT_ROWS])
            new = row.excluded
            counted = {c.name: c + new[c.name] if on_top else new[c.name] for c in _COUNTS}
            key = day_usage.primary_key.columns
            await connection.execute(row.on_conflict_do_update(index_elements=key, set_=counted))

    async def days(
        self,
        first_day: int,
        last_day: int,
        tenant: str | None = None,
        request_class: RequestClass | None = None,
    ) -> list[DayUsage]:
        """Days on which there was something, of one owner or of all; the oldest first."""
        wanted = {"tenant": tenant, "request_class": request_class}
        query = (
            select(*_KEY, *(func.sum(each) for each in _COUNTS))
            .where(day_usage.c.day.between(first_day, last_day))
            .filter_by(**{name: value for name, value in wanted.items() if value is not None})
            .group_by(*_KEY)
            .order_by(*_KEY)
        )
        async with self._database.read() as connection:
            return [_day_usage(row) for row in await connection.execute(query)]

    async def tidy(self, keep_days: int) -> None:
        """Forget what is older, and add up what the writers of a passed day have written."""
        old = day_usage.c.day <= self.today - keep_days
        # As the index has it, which holds the rows of a few days.
        passed = day_usage.c.day <= self.today - TIDY_AFTER_DAYS, text("day_usage.writer <> ''")
        there = (exists().where(old), exists().where(*passed), exists(select(usage)))
        async with self._database.read() as connection:
            if not (await connection.execute(select(or_(*there)))).scalar_one():
                return
        async with self._database.write() as connection:
            await self._database.queue_up(connection, "usage")
            await connection.execute(delete(day_usage).where(old))
            await self._add_up(connection, day_usage, *passed)
            await self._add_up(connection, usage)

    async def _add_up(self, connection: AsyncConnection, table: Table, *which: Any) -> None:
        """Rows of a table, in one row for each of what was billed."""
        taken = await connection.execute(delete(table).where(*which).returning(*table.c))
        sums: dict[tuple[int, Billed], Counts] = {}
        for row in taken.mappings():
            # Servers from before classes were counted know lines of batches alone.
            name = Billed(row["tenant"], row.get("request_class", "batch"), row.get("model", ""))
            counts = Counts(*(row[each] for each in Counts.__struct_fields__))
            key = row["day"], name
            sums[key] = sums.get(key, Counts()) + counts
        found = [DayUsage(day, billed, counts) for (day, billed), counts in sums.items()]
        await self._write(connection, NOBODY, found, on_top=True)


def _day_usage(row: Sequence[Any]) -> DayUsage:
    day, *billed = row[: len(_KEY)]
    # PostgreSQL's sums of integers are decimals.
    return DayUsage(day, Billed(*billed), Counts(*map(int, row[len(_KEY) :])))
