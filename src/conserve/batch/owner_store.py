"""Whose files and batches there are, for who runs the servers: to look, to hand over, to delete.

An owner is a tenant: the digest of an API key, or `everybody` where keys mean nothing. One whose
key no server accepts any more reaches nothing of its own; its batches go on all the same.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from sqlalchemy import case, delete, func, select, update

from conserve.batch.database import Database
from conserve.batch.ended import uncount
from conserve.batch.file_store import FileStore
from conserve.batch.lifecycle import LIVE, FileState, Status
from conserve.batch.schema import batches, files, lines, results, shares, webhooks


class Owner(Struct, frozen=True):
    """What one tenant has in the store. `last_batch_at` is None without a batch."""

    tenant: str
    num_live_batches: int = 0
    num_ended_batches: int = 0
    num_files: int = 0
    num_bytes: int = 0
    last_batch_at: float | None = None


class OwnerStore:
    """Raises StoreUnavailableError."""

    def __init__(self, database: Database, file_store: FileStore) -> None:
        self._database = database
        self._files = file_store

    async def owners(self) -> list[Owner]:
        """All of them, in the order of their names."""
        live = func.sum(case((batches.c.status.in_(sorted(LIVE)), 1), else_=0))
        made = select(batches.c.tenant, live, func.count(), func.max(batches.c.created_at))
        kept = select(files.c.tenant, func.count(), func.sum(files.c.bytes))
        kept = kept.where(files.c.state == FileState.READY)
        async with self._database.read() as connection:
            batch_rows = (await connection.execute(made.group_by(batches.c.tenant))).all()
            file_rows = (await connection.execute(kept.group_by(files.c.tenant))).all()
        of_batches = {tenant: numbers for tenant, *numbers in batch_rows}
        of_files = {tenant: numbers for tenant, *numbers in file_rows}
        found = []
        for tenant in sorted({*of_batches, *of_files}):
            num_live, num_batches, last_at = of_batches.get(tenant, (0, 0, None))
            num_files, num_bytes = of_files.get(tenant, (0, 0))
            num_ended = num_batches - num_live
            found.append(Owner(tenant, num_live, num_ended, num_files, int(num_bytes), last_at))
        return found

    async def move(self, tenant: str, new_tenant: str) -> None:
        """Hand everything over. Keys of idempotency are forgotten: the new owner may have used the
        same."""
        async with self._database.write() as connection:
            forgotten = {"idempotency_key": None, "idempotency_digest": None}
            await connection.execute(
                update(batches)
                .where(batches.c.tenant == tenant)
                .values(tenant=new_tenant, **forgotten)
            )
            for table in (files, webhooks):
                await connection.execute(
                    update(table).where(table.c.tenant == tenant).values(tenant=new_tenant)
                )
            await connection.execute(delete(shares).where(shares.c.tenant == tenant))

    async def delete(self, tenant: str) -> None:
        """Delete everything at once, live batches too: what their workers bring is not taken."""
        mine = select(batches.c.id).where(batches.c.tenant == tenant)
        async with self._database.read() as connection:
            ids = (await connection.execute(mine)).scalars().all()
        for batch_id in ids:
            await self._delete_batch(batch_id)
        async with self._database.write() as connection:
            for table in (webhooks, shares):
                await connection.execute(delete(table).where(table.c.tenant == tenant))
        await self._files.delete_all(tenant)

    async def _delete_batch(self, batch_id: str) -> None:
        here: Any = batches.c.id == batch_id
        async with self._database.write() as connection:
            query = select(batches.c.status).where(here).with_for_update()
            status = (await connection.execute(query)).scalar()
            if status is None:
                return
            for table in (results, lines):
                await connection.execute(delete(table).where(table.c.batch_id == batch_id))
            await uncount(connection, batch_id, Status(status))
            await connection.execute(delete(batches).where(here))
