"""Rows of batches as their owners see them: create, look, cancel."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from conserve.batch.database import Database
from conserve.batch.deadlines import BatchView, view_of
from conserve.batch.ended import count_ended
from conserve.batch.errors import InvalidRequestError, LeaseLostError, NotFoundError
from conserve.batch.file_store import BATCH, later
from conserve.batch.ids import BATCH_ID, FILE_ID, new_batch_id
from conserve.batch.lifecycle import CANCELLABLE, PAUSABLE, TERMINAL, FileState, Status, check
from conserve.batch.quota import Quota
from conserve.batch.records import BatchRecord, FileRecord, LiveBatch
from conserve.batch.schema import batches, files, is_live
from conserve.batch.wire import BatchCreate, deadline_time, duration_s


async def move(
    connection: AsyncConnection, batch: BatchRecord, target: Status, now: float, **values: Any
) -> None:
    """The only place that changes a status.

    Raises BadTransitionError when the lifecycle has no such edge, and LeaseLostError when the
    batch is no longer as the record shows it.
    """
    check(batch.status, target)
    statement = update(batches).where(
        batches.c.id == batch.id,
        batches.c.status == batch.status,
        batches.c.owner.is_not_distinct_from(batch.owner),
    )
    changed = await connection.execute(
        statement.values({"status": target, f"{target}_at": now, **values})
    )
    if changed.rowcount != 1:
        raise LeaseLostError(f"{batch.id} is no longer {batch.status} in these hands")
    if target in TERMINAL:
        await count_ended(connection, batch.id, target, now)


class BatchStore:
    def __init__(self, database: Database, clock: Callable[[], float], quota: Quota) -> None:
        self._database = database
        self._clock = clock
        self._quota = quota

    async def input_file(self, tenant: str, request: BatchCreate) -> FileRecord:
        """The file a request names.

        Raises InvalidRequestError: no id, no such file, or not uploaded for a batch.
        """
        async with self._database.read() as connection:
            return await self._input_file(connection, tenant, request.input_file_id)

    async def _input_file(
        self, connection: AsyncConnection, tenant: str, file_id: str
    ) -> FileRecord:
        row = None
        if FILE_ID.fullmatch(file_id):
            # The lock keeps the file from being deleted before the batch that reads it exists.
            query = select(files).where(
                files.c.id == file_id, files.c.tenant == tenant, files.c.state == FileState.READY
            )
            row = (await connection.execute(query.with_for_update(read=True))).first()
        file = FileRecord.from_row(row) if row is not None else None
        if file is None or (file.expires_at is not None and file.expires_at <= self._clock()):
            message = f"input_file_id: there is no file {file_id!r}; upload it with /v1/files."
            raise InvalidRequestError(message, code="file_not_found", param="input_file_id")
        if file.purpose != BATCH:
            message = f"input_file_id: the file's purpose is {file.purpose!r}, not 'batch'."
            raise InvalidRequestError(message, code="invalid_purpose", param="input_file_id")
        return file

    async def find(self, tenant: str, request: BatchCreate, key: str) -> BatchRecord | None:
        """The batch that `key` made before. Raises InvalidRequestError: for another request."""
        async with self._database.read() as connection:
            return await self._known(connection, tenant, key, digest(request))

    async def create(
        self,
        tenant: str,
        request: BatchCreate,
        key: str | None,
        estimated_tokens: int,
        model: str | None = None,
    ) -> BatchRecord:
        """A new batch in `validating`, or the one that `key` made before.

        model: whose servers take the batch; None leaves it to any.

        Raises InvalidRequestError: the input file is unfit, the deadline is none, or `key` was used
        for another request; OverLimitError.
        """
        batch = new_batch(tenant, request, key, estimated_tokens, model, self._clock())
        async with self._database.write() as connection:
            if known := await self._known(connection, tenant, key, batch.idempotency_digest):
                return known
            file = await self._input_file(connection, tenant, request.input_file_id)
            await self._quota.check_batch(connection, tenant, file.num_lines, estimated_tokens)
            await connection.execute(
                self._database.insert(batches).values(batch.to_row()).on_conflict_do_nothing()
            )
            query = select(batches).where(batches.c.id == batch.id)
            row = (await connection.execute(query)).first()
            if row is not None:
                return BatchRecord.from_row(row)
            # Another server used the key between our look and our insert.
            known = await self._known(connection, tenant, key, batch.idempotency_digest)
            assert known is not None
            return known

    async def _known(
        self, connection: AsyncConnection, tenant: str, key: str | None, wanted: str | None
    ) -> BatchRecord | None:
        """The batch that `key` made, whose request must have the digest `wanted`."""
        if key is None:
            return None
        query = select(batches).where(batches.c.tenant == tenant, batches.c.idempotency_key == key)
        row = (await connection.execute(query)).first()
        known = BatchRecord.from_row(row) if row is not None else None
        if known is not None and known.idempotency_digest != wanted:
            raise InvalidRequestError(
                "Idempotency-Key was used for a batch with other parameters; use a new one.",
                code="idempotency_key_reused",
                param="Idempotency-Key",
            )
        return known

    async def get(self, tenant: str, batch_id: str) -> BatchRecord:
        """Raises NotFoundError: no such batch, or another tenant's."""
        async with self._database.read() as connection:
            return await self._batch(connection, tenant, batch_id)

    async def _batch(
        self, connection: AsyncConnection, tenant: str, batch_id: str, lock: bool = False
    ) -> BatchRecord:
        query = select(batches).where(batches.c.id == batch_id, batches.c.tenant == tenant)
        row = None
        if BATCH_ID.fullmatch(batch_id):
            query = query.with_for_update() if lock else query
            row = (await connection.execute(query)).first()
        if row is None:
            raise NotFoundError(f"No such Batch object: {batch_id[:100]!r}", param="batch_id")
        return BatchRecord.from_row(row)

    async def page(
        self, tenant: str, after: str | None, limit: int
    ) -> tuple[list[BatchRecord], bool]:
        """Batches older than the one named, newest first, and whether more follow."""
        columns = (batches.c.created_at, batches.c.id)
        query = select(batches).where(batches.c.tenant == tenant)
        async with self._database.read() as connection:
            if after is not None:
                last = await self._batch(connection, tenant, after)
                query = query.where(later(columns, (last.created_at, last.id), True))
            query = query.order_by(*(column.desc() for column in columns)).limit(limit + 1)
            rows = (await connection.execute(query)).all()
        return [BatchRecord.from_row(row) for row in rows[:limit]], len(rows) > limit

    async def cancel(self, tenant: str, batch_id: str) -> BatchRecord:
        """The batch in `cancelling`. What is computed already is kept.

        Raises NotFoundError, or InvalidRequestError when the batch has ended or is ending.
        """
        async with self._database.write() as connection:
            batch = await self._batch(connection, tenant, batch_id, lock=True)
            if batch.status is Status.CANCELLING:  # whoever lost the first answer asks again
                return batch
            if batch.status not in CANCELLABLE:
                message = f"Cannot cancel a batch with status {str(batch.status)!r}."
                raise InvalidRequestError(message, code="batch_not_cancellable", param="batch_id")
            # Whoever validates or assembles the batch finds that it has lost it.
            await move(connection, batch, Status.CANCELLING, self._clock(), owner=None)
            return await self._batch(connection, tenant, batch_id)

    async def pause(self, tenant: str, batch_id: str) -> BatchRecord:
        """No line of the batch begins from here on; its time goes on. Lines in flight end.

        Raises NotFoundError, or InvalidRequestError when no line of it is to run any more.
        """
        return await self._set_paused(tenant, batch_id, self._clock())

    async def resume(self, tenant: str, batch_id: str) -> BatchRecord:
        """Its lines run again. Raises as `pause` does."""
        return await self._set_paused(tenant, batch_id, None)

    async def _set_paused(self, tenant: str, batch_id: str, at: float | None) -> BatchRecord:
        async with self._database.write() as connection:
            batch = await self._batch(connection, tenant, batch_id, lock=True)
            if batch.status not in PAUSABLE or batch.expiring:
                verb = "resume" if at is None else "pause"
                message = f"Cannot {verb} a batch with status {str(batch.status)!r}."
                raise InvalidRequestError(message, code="batch_not_pausable", param="batch_id")
            if (batch.paused_at is None) != (at is None):  # asked again, it stays as it is
                here = batches.c.id == batch_id
                await connection.execute(update(batches).where(here).values(paused_at=at))
            return await self._batch(connection, tenant, batch_id)

    async def source(self, batch_id: str) -> tuple[str, str] | None:
        """The input file and the endpoint of any tenant's batch; None when it is deleted."""
        query = select(batches.c.input_file_id, batches.c.endpoint).where(batches.c.id == batch_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).first()
        return None if row is None else (row[0], row[1])

    async def views(self) -> list[BatchView]:
        """Live batches of every tenant, as the policy sees them."""
        columns = (batches.c[name] for name in LiveBatch.__struct_fields__)
        query = select(*columns).where(is_live())
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).all()
        return [view_of(LiveBatch(*row)) for row in rows]


def new_batch(
    tenant: str,
    request: BatchCreate,
    key: str | None,
    estimated_tokens: int,
    model: str | None,
    now: float,
) -> BatchRecord:
    """Raises InvalidRequestError: the deadline is none."""
    expires = request.output_expires_after
    return BatchRecord(
        id=new_batch_id(),
        tenant=tenant,
        endpoint=request.endpoint,
        input_file_id=request.input_file_id,
        completion_window=request.completion_window,
        priority=request.priority,
        created_at=now,
        expires_at=expiry_of(request, now),
        estimated_tokens=estimated_tokens,
        metadata=request.metadata,
        output_expires_after_s=expires.seconds if expires else None,
        deadline_at=deadline_of(request, now),
        idempotency_key=key,
        idempotency_digest=digest(request),
        model=model,
    )


def digest(request: BatchCreate) -> str:
    """Tells two requests apart that share an Idempotency-Key."""
    return sha256(request.model_dump_json().encode()).hexdigest()


def deadline_of(request: BatchCreate, now: float) -> float | None:
    if request.deadline is None:
        return None
    try:
        return deadline_time(request.deadline, now)
    except ValueError as error:
        message = f"deadline {error}."
        raise InvalidRequestError(message, code="invalid_value", param="deadline") from None


def expiry_of(request: BatchCreate, now: float) -> float:
    """When the batch is to end: its deadline, or the end of its window."""
    return deadline_of(request, now) or now + duration_s(request.completion_window)
