"""Batches that have ended: what they came to in all, and forgetting their lines.

Their rows stay for ever, so nothing that is done again and again may look at each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy import ColumnElement, delete, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from conserve.batch.database import Database
from conserve.batch.lifecycle import LIVE, TERMINAL, Status
from conserve.batch.schema import batches, ended, is_live, lines, results
from conserve.batch.webhook_store import put_down

CLEAR_ROWS = 2000


class Sums(NamedTuple):
    """Of some batches: how many they are, and their columns added up."""

    num_batches: int = 0
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


COLUMNS = Sums._fields[1:]


async def count_ended(
    connection: AsyncConnection, batch_id: str, status: Status, now: float
) -> None:
    """Add a batch that ends to what its owner is told of, and to the sums, in the transaction that
    ends it and after the rest of it: their row is everybody's."""
    await put_down(connection, batch_id, status, now)
    await _add(connection, batch_id, status, num_batches=ended.c.num_batches + 1)


async def uncount(connection: AsyncConnection, batch_id: str, status: Status) -> None:
    """A batch is about to be deleted: what it came to stays in the sums, with what was cancelled
    where it had not ended."""
    if status in LIVE:
        await _add(connection, batch_id, Status.CANCELLED)
        return
    fewer = update(ended).where(ended.c.status == status)
    await connection.execute(fewer.values(num_batches=ended.c.num_batches - 1))


async def _add(
    connection: AsyncConnection, batch_id: str, status: Status, **more: ColumnElement[int]
) -> None:
    here = batches.c.id == batch_id
    added = {
        name: ended.c[name] + select(batches.c[name]).where(here).scalar_subquery()
        for name in COLUMNS
    }
    await connection.execute(update(ended).where(ended.c.status == status).values(**added, **more))


class EndedStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def sums(self) -> Mapping[Status, Sums]:
        """Of the live batches in each status, and of all that ended in each."""
        columns = [func.sum(batches.c[name]) for name in COLUMNS]
        live = select(batches.c.status, func.count(), *columns).where(is_live())
        over = select(ended.c.status, *(ended.c[name] for name in Sums._fields))
        # One statement: a batch that ends meanwhile is in one half or in the other.
        query = live.group_by(batches.c.status).union_all(over)
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).all()
        return {Status(status): Sums(*map(int, numbers)) for status, *numbers in rows}

    async def clear_lines(self) -> bool:
        """Delete some lines and results of batches that ended. True when there may be more."""
        finished = select(batches.c.id).where(
            text("batches.has_lines"), batches.c.status.in_(sorted(TERMINAL))
        )
        async with self._database.read() as connection:
            if (await connection.execute(finished.limit(1))).first() is None:
                return False
        async with self._database.write() as connection:
            # Held to the end of the transaction: what is chosen below is chosen once.
            query = finished.limit(1).with_for_update(skip_locked=True)
            batch_id = (await connection.execute(query)).scalar()
            if batch_id is None:
                return False
            await self._clear(connection, batch_id)
        return True

    @staticmethod
    async def _clear(connection: AsyncConnection, batch_id: str) -> None:
        numbers = select(lines.c.line_no).where(lines.c.batch_id == batch_id)
        query = numbers.order_by(lines.c.line_no).offset(CLEAR_ROWS - 1).limit(1)
        last = (await connection.execute(query)).scalar()
        for table in (results, lines):
            doomed = delete(table).where(table.c.batch_id == batch_id)
            await connection.execute(
                doomed if last is None else doomed.where(table.c.line_no <= last)
            )
        if last is None:
            await connection.execute(
                update(batches).where(batches.c.id == batch_id).values(has_lines=False)
            )
