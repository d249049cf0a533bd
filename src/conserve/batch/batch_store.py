"""Rows of batches as their owners see them: create, look, cancel."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

from sqlalchemy import RowMapping, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from conserve.batch.database import Database
from conserve.batch.deadlines import BatchView
from conserve.batch.errors import InvalidRequestError, LeaseLostError, NotFoundError
from conserve.batch.file_store import BATCH, READY, later
from conserve.batch.ids import BATCH_ID, FILE_ID, new_batch_id
from conserve.batch.lifecycle import CANCELLABLE, LIVE, Status, check
from conserve.batch.schema import batches, files
from conserve.batch.wire import BatchCreate, deadline_time, duration_s

MEASURED_LINES = 20


async def move(
    connection: AsyncConnection, row: RowMapping, target: Status, now: float, **values: Any
) -> None:
    """The only statement that changes a status.

    Raises BadTransitionError when the lifecycle has no such edge, and LeaseLostError when the
    batch is no longer as `row` shows it.
    """
    current = Status(row["status"])
    check(current, target)
    statement = update(batches).where(
        batches.c.id == row["id"],
        batches.c.status == current,
        batches.c.owner.is_not_distinct_from(row["owner"]),
    )
    changed = await connection.execute(
        statement.values({"status": target, f"{target}_at": now, **values})
    )
    if changed.rowcount != 1:
        raise LeaseLostError(f"{row['id']} is no longer {current} in these hands")


class BatchStore:
    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def input_file(self, tenant: str, request: BatchCreate) -> RowMapping:
        """Row of the file a request names.

        Raises InvalidRequestError: no id, no such file, or not uploaded for a batch.
        """
        async with self._database.read() as connection:
            return await self._input_file(connection, tenant, request.input_file_id)

    async def _input_file(
        self, connection: AsyncConnection, tenant: str, file_id: str
    ) -> RowMapping:
        row = None
        if FILE_ID.fullmatch(file_id):
            # The lock keeps the file from being deleted before the batch that reads it exists.
            query = select(files).where(
                files.c.id == file_id, files.c.tenant == tenant, files.c.state == READY
            )
            row = (await connection.execute(query.with_for_update(read=True))).mappings().first()
        if row is None or (row["expires_at"] is not None and row["expires_at"] <= self._clock()):
            message = f"input_file_id: there is no file {file_id!r}; upload it with /v1/files."
            raise InvalidRequestError(message, code="file_not_found", param="input_file_id")
        if row["purpose"] != BATCH:
            message = f"input_file_id: the file's purpose is {row['purpose']!r}, not 'batch'."
            raise InvalidRequestError(message, code="invalid_purpose", param="input_file_id")
        return row

    async def find(self, tenant: str, request: BatchCreate, key: str) -> RowMapping | None:
        """The batch that `key` made before. Raises InvalidRequestError: for another request."""
        async with self._database.read() as connection:
            wanted = {"tenant": tenant, "idempotency_key": key}
            return await self._known(connection, {**wanted, "idempotency_digest": digest(request)})

    async def create(
        self,
        tenant: str,
        request: BatchCreate,
        key: str | None,
        estimated_tokens: int,
        model: str | None = None,
    ) -> RowMapping:
        """A new batch in `validating`, or the one that `key` made before.

        model: whose servers take the batch; None leaves it to any.

        Raises InvalidRequestError: the input file is unfit, the deadline is none, or `key` was used
        for another request.
        """
        row = self._new_row(tenant, request, key, estimated_tokens) | {"model": model}
        async with self._database.write() as connection:
            if key is not None and (known := await self._known(connection, row)):
                return known
            await self._input_file(connection, tenant, request.input_file_id)
            await connection.execute(
                self._database.insert(batches).values(row).on_conflict_do_nothing()
            )
            query = select(batches).where(batches.c.id == row["id"])
            created = (await connection.execute(query)).mappings().first()
            if created is None:  # another server used the key between our look and our insert
                created = await self._known(connection, row)
            assert created is not None
            return created

    async def _known(self, connection: AsyncConnection, row: dict[str, Any]) -> RowMapping | None:
        query = select(batches).where(
            batches.c.tenant == row["tenant"], batches.c.idempotency_key == row["idempotency_key"]
        )
        known = (await connection.execute(query)).mappings().first()
        if known is not None and known["idempotency_digest"] != row["idempotency_digest"]:
            raise InvalidRequestError(
                "Idempotency-Key was used for a batch with other parameters; use a new one.",
                code="idempotency_key_reused",
                param="Idempotency-Key",
            )
        return known

    def _new_row(
        self, tenant: str, request: BatchCreate, key: str | None, estimated_tokens: int
    ) -> dict[str, Any]:
        now = self._clock()
        deadline_at = deadline_of(request, now)
        expires = request.output_expires_after
        counters = ("total", "completed", "failed", "input_tokens", "cached_tokens")
        return {
            "id": new_batch_id(),
            "tenant": tenant,
            "endpoint": request.endpoint,
            "input_file_id": request.input_file_id,
            "completion_window": request.completion_window,
            "metadata": json.dumps(request.metadata) if request.metadata is not None else None,
            "output_expires_after_s": expires.seconds if expires else None,
            "priority": request.priority,
            "deadline_at": deadline_at,
            "idempotency_key": key,
            "idempotency_digest": digest(request),
            "status": Status.VALIDATING,
            "expiring": False,
            "not_before": 0.0,
            "created_at": now,
            "expires_at": deadline_at or now + duration_s(request.completion_window),
            **dict.fromkeys((*counters, "output_tokens", "reasoning_tokens"), 0),
            "estimated_tokens": estimated_tokens,
            "has_lines": False,
        }

    async def get(self, tenant: str, batch_id: str) -> RowMapping:
        """Raises NotFoundError: no such batch, or another tenant's."""
        async with self._database.read() as connection:
            return await self._row(connection, tenant, batch_id)

    async def _row(
        self, connection: AsyncConnection, tenant: str, batch_id: str, lock: bool = False
    ) -> RowMapping:
        query = select(batches).where(batches.c.id == batch_id, batches.c.tenant == tenant)
        row = None
        if BATCH_ID.fullmatch(batch_id):
            query = query.with_for_update() if lock else query
            row = (await connection.execute(query)).mappings().first()
        if row is None:
            raise NotFoundError(f"No such Batch object: {batch_id[:100]!r}", param="batch_id")
        return row

    async def page(
        self, tenant: str, after: str | None, limit: int
    ) -> tuple[Sequence[RowMapping], bool]:
        """Batches older than the one named, newest first, and whether more follow."""
        columns = (batches.c.created_at, batches.c.id)
        query = select(batches).where(batches.c.tenant == tenant)
        async with self._database.read() as connection:
            if after is not None:
                row = await self._row(connection, tenant, after)
                query = query.where(later(columns, (row["created_at"], row["id"]), True))
            query = query.order_by(*(column.desc() for column in columns)).limit(limit + 1)
            rows = (await connection.execute(query)).mappings().all()
        return rows[:limit], len(rows) > limit

    async def cancel(self, tenant: str, batch_id: str) -> RowMapping:
        """The batch in `cancelling`. What is computed already is kept.

        Raises NotFoundError, or InvalidRequestError when the batch has ended or is ending.
        """
        async with self._database.write() as connection:
            row = await self._row(connection, tenant, batch_id, lock=True)
            if Status(row["status"]) not in CANCELLABLE:
                message = f"Cannot cancel a batch with status {row['status']!r}."
                raise InvalidRequestError(message, code="batch_not_cancellable", param="batch_id")
            # Whoever validates or assembles the batch finds that it has lost it.
            await move(connection, row, Status.CANCELLING, self._clock(), owner=None)
            return await self._row(connection, tenant, batch_id)

    async def source(self, batch_id: str) -> tuple[str, str]:
        """The input file and the endpoint of any tenant's batch."""
        query = select(batches.c.input_file_id, batches.c.endpoint).where(batches.c.id == batch_id)
        async with self._database.read() as connection:
            file_id, endpoint = (await connection.execute(query)).one()
        return file_id, endpoint

    async def views(self) -> list[BatchView]:
        """Live batches of every tenant, as the policy sees them."""
        query = select(batches).where(batches.c.status.in_(sorted(LIVE)))
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).mappings().all()
        return [view(row) for row in rows]


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


def view(row: RowMapping) -> BatchView:
    """Remaining work by the batch's own mean once it has shown one, by the estimate before."""
    done, total = row["completed"] + row["failed"], row["total"]
    left = total - done
    if done >= MEASURED_LINES:
        remaining = (row["input_tokens"] + row["output_tokens"]) / done * left
    else:
        remaining = row["estimated_tokens"] * (left / total if total else 1.0)
    if Status(row["status"]) in (Status.CANCELLING, Status.FINALIZING) or row["expiring"]:
        remaining = 0.0
    return BatchView(
        row["id"], row["created_at"], row["priority"], row["expires_at"], remaining, row["model"]
    )
