"""Workers: who is there, and what becomes of the work of those that are not.

A worker holds work as long as it sends heartbeats. When it stops, its row goes and its work with
it; from then on nothing it brings is taken.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from conserve.batch.database import Database
from conserve.batch.due import is_due
from conserve.batch.errors import LeaseLostError
from conserve.batch.lifecycle import LineState
from conserve.batch.schema import batches, lines, workers


class WorkerStore:
    def __init__(self, database: Database, clock: Callable[[], float], lease_s: float) -> None:
        self._database = database
        self._clock = clock
        self._lease_s = lease_s

    async def enlist(self, worker_id: str) -> None:
        async with self._database.write() as connection:
            row = {"id": worker_id, "expires_at": self._clock() + self._lease_s}
            await connection.execute(insert(workers).values(row))

    async def heartbeat(self, worker_id: str) -> None:
        """Raises LeaseLostError: the worker was taken for dead, and its work is somebody else's."""
        async with self._database.write() as connection:
            changed = await connection.execute(
                update(workers)
                .where(workers.c.id == worker_id)
                .values(expires_at=self._clock() + self._lease_s)
            )
            if changed.rowcount != 1:
                raise LeaseLostError(worker_id)

    async def overdue(self) -> list[str]:
        """Workers without a heartbeat for a lease."""
        query = select(workers.c.id).where(is_due(workers.c.expires_at, self._clock()))
        async with self._database.read() as connection:
            return list((await connection.execute(query)).scalars())

    async def others(self, worker_id: str) -> list[str]:
        query = select(workers.c.id).where(workers.c.id != worker_id)
        async with self._database.read() as connection:
            return list((await connection.execute(query)).scalars())

    async def bury(self, worker_id: str, *, only_overdue: bool) -> bool:
        """Take a dead worker's work back, one loss noted on each of its lines and its job. False
        when somebody else did, or the worker is alive after all."""
        async with self._database.write() as connection:
            doomed = delete(workers).where(workers.c.id == worker_id)
            if only_overdue:
                doomed = doomed.where(is_due(workers.c.expires_at, self._clock()))
            if (await connection.execute(doomed)).rowcount != 1:
                return False
            await self._free(connection, worker_id, lost=True)
            return True

    async def retire(self, worker_id: str) -> None:
        """Give everything back and go."""
        async with self._database.write() as connection:
            await connection.execute(delete(workers).where(workers.c.id == worker_id))
            await self._free(connection, worker_id, lost=False)

    @staticmethod
    async def _free(connection: AsyncConnection, worker_id: str, *, lost: bool) -> None:
        await connection.execute(
            update(batches)
            .where(batches.c.owner == worker_id)
            .values(owner=None, losses=batches.c.losses + int(lost))
        )
        await connection.execute(
            update(lines)
            .where(lines.c.owner == worker_id, lines.c.state == LineState.LEASED)
            .values(state=LineState.PENDING, owner=None, losses=lines.c.losses + int(lost))
        )


async def hold_worker(connection: AsyncConnection, worker_id: str) -> None:
    """Keep the worker from being buried until the transaction ends.

    Raises LeaseLostError when it has been: what a buried worker takes, nobody would take back.
    """
    query = select(workers.c.id).where(workers.c.id == worker_id).with_for_update(read=True)
    if (await connection.execute(query)).first() is None:
        raise LeaseLostError(worker_id)
