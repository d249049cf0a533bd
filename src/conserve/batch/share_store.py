"""What each owner has had of the harvest, kept in the database so that every server knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from conserve.batch.database import Database
from conserve.batch.outcome import Result
from conserve.batch.schema import lines, shares
from conserve.batch.shares import Standing


class ShareStore:
    """Raises StoreUnavailableError."""

    def __init__(self, database: Database, share_of: Callable[[str], float]) -> None:
        self._database = database
        self._share_of = share_of

    async def standing(self) -> Standing:
        # As the index of leased lines is sorted; by batch alone, SQLite would read all lines.
        query = select(lines.c.batch_id, func.count()).where(lines.c.owner.is_not(None))
        running = query.group_by(lines.c.owner, lines.c.batch_id)
        async with self._database.read() as connection:
            served = (await connection.execute(select(shares.c.tenant, shares.c.served))).all()
            rows = (await connection.execute(running)).all()
        num_running = Counter[str]()
        for batch_id, count in rows:
            num_running[batch_id] += count
        # One share for each owner in one look, which asks for it many times.
        return Standing(dict(map(tuple, served)), num_running, cache(self._share_of))

    async def charge(
        self, connection: AsyncConnection, tenant: str, done: Iterable[Result]
    ) -> None:
        """Count what an owner's lines took, in the transaction that stores their results and after
        the rest of it: the row is all workers'. A line is a token at least."""
        cost = sum(max(1, result.tokens.total) for result in done) / self._share_of(tenant)
        row = self._database.insert(shares).values(tenant=tenant, served=cost)
        more = {"served": shares.c.served + row.excluded.served}
        await connection.execute(row.on_conflict_do_update(index_elements=["tenant"], set_=more))

    async def lift(self, tenant: str, floor: float) -> None:
        """Forget what the tenant left to others, as far as it has had less than `floor`."""
        async with self._database.write() as connection:
            row = self._database.insert(shares).values(tenant=tenant, served=0.0)
            await connection.execute(row.on_conflict_do_nothing())
            low = shares.c.tenant == tenant, shares.c.served < floor
            await connection.execute(update(shares).where(*low).values(served=floor))
