"""Ends of batches that owners have not been told of: put down with the end itself, and gone once
told. Whoever takes one has it for a while; then another server may."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from conserve.batch.database import Database
from conserve.batch.due import is_due
from conserve.batch.schema import batches, webhooks

HELD_S = 60.0
"""Longer than one try takes."""


class Event(Struct, frozen=True):
    """A batch has ended in `status`. `attempts` are the tries so far, this one included."""

    batch_id: str
    tenant: str
    status: str
    created_at: float
    attempts: int


async def put_down(connection: AsyncConnection, batch_id: str, status: str, now: float) -> None:
    """In the transaction that ends the batch."""
    tenant = select(batches.c.tenant).where(batches.c.id == batch_id).scalar_subquery()
    row = {"batch_id": batch_id, "tenant": tenant, "status": status, "created_at": now}
    await connection.execute(insert(webhooks).values(**row, attempts=0, not_before=0.0))


class WebhookStore:
    """Raises StoreUnavailableError."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def owners(self) -> list[str]:
        """Those of whose events some are due; who waits longest is first."""
        due = is_due(webhooks.c.not_before, self._clock())
        query = select(webhooks.c.tenant).where(due).group_by(webhooks.c.tenant)
        async with self._database.read() as connection:
            rows = await connection.execute(query.order_by(func.min(webhooks.c.not_before)))
            return list(rows.scalars())

    async def take(self, tenant: str, limit: int) -> list[Event]:
        """Up to so many of an owner's that are due, for nobody else to take for HELD_S."""
        now = self._clock()
        due = is_due(webhooks.c.not_before, now), webhooks.c.tenant == tenant
        columns = (webhooks.c[name] for name in Event.__struct_fields__)
        query = select(*columns).where(*due).order_by(webhooks.c.not_before).limit(limit)
        async with self._database.write() as connection:
            rows = (await connection.execute(query.with_for_update(skip_locked=True))).all()
            found = [Event(*row) for row in rows]
            taken = webhooks.c.batch_id.in_([event.batch_id for event in found])
            more = {"attempts": webhooks.c.attempts + 1, "not_before": now + HELD_S}
            await connection.execute(update(webhooks).where(taken).values(**more))
        return [replace(event, attempts=event.attempts + 1) for event in found]

    async def forget(self, event: Event) -> None:
        async with self._database.write() as connection:
            here = webhooks.c.batch_id == event.batch_id
            await connection.execute(delete(webhooks).where(here))

    async def give_up(self, tenant: str, before: float) -> int:
        """Forget what an owner was to be told of ends before that; how much it was."""
        old = webhooks.c.tenant == tenant, webhooks.c.created_at < before
        async with self._database.write() as connection:
            return (await connection.execute(delete(webhooks).where(*old))).rowcount

    async def postpone(self, event: Event, delay_s: float) -> None:
        async with self._database.write() as connection:
            here = webhooks.c.batch_id == event.batch_id
            later = self._clock() + delay_s
            await connection.execute(update(webhooks).where(here).values(not_before=later))
