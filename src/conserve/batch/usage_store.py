"""What each owner's lines came to on each day, for bills: every line once, in the transaction that
stores its result. It stays when batches, or all that an owner has, are deleted or moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from conserve.batch.database import Database
from conserve.batch.outcome import Result, Tokens
from conserve.batch.schema import usage

DAY_S = 86_400


class DayUsage(Struct, frozen=True):
    """Of one owner and one day since the epoch, in UTC: lines by how they ended, and tokens."""

    tenant: str
    day: int
    completed: int
    failed: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int


COUNTS = DayUsage.__struct_fields__[2:]


class UsageStore:
    """Raises StoreUnavailableError."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def count(self, connection: AsyncConnection, tenant: str, done: Sequence[Result]) -> None:
        """Add lines that have ended, in the transaction that stores them and after the rest of it:
        the row is all workers'."""
        here = {"tenant": tenant, "day": int(self._clock() // DAY_S)}
        row = self._database.insert(usage).values(**here, **dict.fromkeys(COUNTS, 0))
        await connection.execute(row.on_conflict_do_nothing())
        tokens = sum((result.tokens for result in done), Tokens())
        failed = sum(result.failed for result in done)
        counts = (
            len(done) - failed,
            failed,
            tokens.input,
            tokens.cached,
            tokens.output,
            tokens.reasoning,
        )
        added = {name: usage.c[name] + more for name, more in zip(COUNTS, counts, strict=True)}
        await connection.execute(update(usage).filter_by(**here).values(**added))

    async def days(
        self, first_day: int, last_day: int, tenant: str | None = None
    ) -> list[DayUsage]:
        """Days on which there was something, of one owner or of all; the oldest first."""
        columns = (usage.c[name] for name in DayUsage.__struct_fields__)
        query = select(*columns).where(usage.c.day.between(first_day, last_day))
        if tenant is not None:
            query = query.where(usage.c.tenant == tenant)
        async with self._database.read() as connection:
            rows = await connection.execute(query.order_by(usage.c.day, usage.c.tenant))
            return [DayUsage(*row) for row in rows]
