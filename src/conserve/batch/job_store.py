"""Work on whole batches: validating and assembling. One worker holds a batch at once.

Each step of a job checks, in the transaction that writes, that the batch is still this worker's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

from sqlalchemy import Select, and_, case, delete, exists, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from conserve.batch.batch_store import move
from conserve.batch.database import Database
from conserve.batch.due import is_due
from conserve.batch.errors import LeaseLostError
from conserve.batch.file_store import BATCH_OUTPUT, DOOMED
from conserve.batch.lifecycle import FileState, LineState, Status
from conserve.batch.records import BatchRecord, FileRecord, LineEnd, encode_errors
from conserve.batch.schema import batches, files, is_live, is_passing, lines, of_models, results
from conserve.batch.settings import MAX_BIGINT
from conserve.batch.validation import LineIndex, Validation
from conserve.batch.wire import LineErrorObject
from conserve.batch.worker_store import hold_worker

# Results are whole answers, and vectors and logprobs are long: so many are in memory at once while
# an output file is written.
ASSEMBLY_ROWS = 64
ASSEMBLY_BYTES = 8 * 1024 * 1024


class JobStore:
    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def expire(self) -> None:
        """Close batches whose time is over to further leases and to validation: what is left is to
        end them, which any worker may."""
        late = and_(
            is_live(),
            or_(
                batches.c.status == Status.VALIDATING,
                # One whose lines have all ended in time is complete, and only to be assembled.
                and_(batches.c.status == Status.IN_PROGRESS, ~_is_done()),
            ),
            batches.c.expiring.is_(False),
            batches.c.expires_at <= self._clock(),
        )
        async with self._database.read() as connection:
            if not (await connection.execute(select(exists().where(late)))).scalar_one():
                return
        async with self._database.write() as connection:
            # Whoever validates such a batch finds that it has lost it.
            owner = case((batches.c.status == Status.VALIDATING, None), else_=batches.c.owner)
            await connection.execute(update(batches).where(late).values(expiring=True, owner=owner))

    async def claim(
        self, worker_id: str, models: Collection[str] | None = None
    ) -> BatchRecord | None:
        """A batch that waits to be validated or assembled, now this worker's; oldest first.

        models: whose files this worker may validate; None for any. A worker does one job at a
        time: one it holds already was dropped in an outage.
        """
        free = or_(batches.c.owner.is_(None), batches.c.owner == worker_id)
        is_any_workers = or_(batches.c.status != Status.VALIDATING, batches.c.expiring)
        fit = or_(is_any_workers, of_models(models))
        ready = and_(free, fit, is_due(batches.c.not_before, self._clock()), _needs_work())
        query = (
            select(batches.c.id).where(ready).order_by(batches.c.created_at, batches.c.id).limit(1)
        )
        async with self._database.read() as connection:
            if (await connection.execute(query)).first() is None:
                return None
        async with self._database.write() as connection:
            await hold_worker(connection, worker_id)
            batch_id = (await connection.execute(query.with_for_update(skip_locked=True))).scalar()
            if batch_id is None:
                return None
            await connection.execute(
                update(batches).where(batches.c.id == batch_id).values(owner=worker_id)
            )
            return await self._owned(connection, batch_id, worker_id)

    async def postpone(self, batch: BatchRecord, delay_s: float, *, counted: bool) -> None:
        """Let go of a job that failed; it is taken up again after a while. `counted` when the try
        counts against its bound."""
        async with self._database.write() as connection:
            await connection.execute(
                update(batches)
                .where(batches.c.id == batch.id, batches.c.owner == batch.owner)
                .values(
                    owner=None,
                    not_before=self._clock() + delay_s,
                    attempts=batches.c.attempts + int(counted),
                )
            )

    async def give_up(self, batch: BatchRecord, reason: LineErrorObject) -> None:
        """Any live status -> failed: its job has failed for good."""
        async with self._database.write() as connection:
            held = await self._owned(connection, batch.id, batch.owner)
            told = encode_errors([reason])
            await move(connection, held, Status.FAILED, self._clock(), owner=None, errors=told)

    @staticmethod
    async def _owned(
        connection: AsyncConnection, batch_id: str, worker_id: str | None
    ) -> BatchRecord:
        query = select(batches).where(batches.c.id == batch_id, batches.c.owner == worker_id)
        row = (await connection.execute(query.with_for_update())).first()
        if row is None:
            raise LeaseLostError(batch_id)
        return BatchRecord.from_row(row)

    async def clear_lines(self, batch: BatchRecord) -> None:
        """Forget what an earlier validation of this batch put down."""
        async with self._database.write() as connection:
            await self._owned(connection, batch.id, batch.owner)
            await connection.execute(delete(lines).where(lines.c.batch_id == batch.id))
            await connection.execute(
                update(batches).where(batches.c.id == batch.id).values(has_lines=True)
            )

    async def add_lines(self, batch: BatchRecord, found: Sequence[LineIndex]) -> None:
        """Put good lines down; none is leased before the batch is in progress."""
        fresh = {"batch_id": batch.id, "state": LineState.PENDING, "owner": None}
        zeros = {"not_before": 0.0, "attempts": 0, "losses": 0}
        values = [
            {
                "line_no": line.line_no,
                "custom_id": line.custom_id,
                "offset": line.offset,
                "length": line.length,
                "prefix_key": line.prefix_key,
                **fresh,
                **zeros,
            }
            for line in found
        ]
        async with self._database.write() as connection:
            owned = await self._owned(connection, batch.id, batch.owner)
            if owned.status != Status.VALIDATING:
                raise LeaseLostError(batch.id)
            await connection.execute(insert(lines), values)

    async def accept(self, batch: BatchRecord, validation: Validation) -> None:
        """validating -> in_progress."""
        async with self._database.write() as connection:
            await move(
                connection,
                batch,
                Status.IN_PROGRESS,
                self._clock(),
                owner=None,
                total=validation.num_lines,
                model=validation.model,
                estimated_tokens=min(validation.estimated_tokens, MAX_BIGINT),
                attempts=0,
                losses=0,
            )

    async def refuse(self, batch: BatchRecord, errors: Sequence[LineErrorObject]) -> None:
        """validating -> failed."""
        told = encode_errors(errors)
        async with self._database.write() as connection:
            await move(connection, batch, Status.FAILED, self._clock(), owner=None, errors=told)

    async def finalize(self, batch: BatchRecord) -> BatchRecord:
        """in_progress -> finalizing, still this worker's."""
        async with self._database.write() as connection:
            await move(connection, batch, Status.FINALIZING, self._clock())
            return await self._owned(connection, batch.id, batch.owner)

    async def outcomes(self, batch_id: str) -> AsyncIterator[list[LineEnd]]:
        """Every line, in the order of the file, some at a time."""
        last = 0
        while True:
            async with self._database.read() as connection:
                numbers = await self._next_numbers(connection, batch_id, last)
                if not numbers:
                    return
                query = _ends(lines.c.custom_id, results.c.failed, results.c.payload)
                here = (
                    lines.c.batch_id == batch_id,
                    lines.c.line_no.between(numbers[0], numbers[-1]),
                )
                rows = await connection.execute(query.where(*here).order_by(lines.c.line_no))
                ends = [LineEnd(*row) for row in rows]
            yield ends
            last = numbers[-1]

    @staticmethod
    async def _next_numbers(connection: AsyncConnection, batch_id: str, last: int) -> list[int]:
        """Of lines after `last`, whose results fit into memory; of one in any case."""
        query = _ends(func.coalesce(func.length(results.c.payload), 0))
        here = lines.c.batch_id == batch_id, lines.c.line_no > last
        query = query.where(*here).order_by(lines.c.line_no).limit(ASSEMBLY_ROWS)
        rows = (await connection.execute(query)).all()
        ends = list(accumulate(num_bytes for _, num_bytes in rows))
        return [number for number, _ in rows[: max(1, bisect_right(ends, ASSEMBLY_BYTES))]]

    async def drop_leavings(self, batch: BatchRecord, filenames: Collection[str]) -> Sequence[str]:
        """Give up files of these names that an earlier run of this job kept. Returns their ids. The
        rows go with the next collection: that run may be about to put its content there again.

        Raises LeaseLostError: they may be another worker's, who has the job.
        """
        left = (
            is_passing(),
            files.c.state == FileState.UPLOADING,
            files.c.purpose == BATCH_OUTPUT,
            files.c.filename.in_(filenames),
        )
        async with self._database.write() as connection:
            await self._owned(connection, batch.id, batch.owner)
            query = select(files.c.id).where(*left).with_for_update()
            ids = (await connection.execute(query)).scalars().all()
            await connection.execute(update(files).where(files.c.id.in_(ids)).values(**DOOMED))
        return ids

    async def settle(
        self, batch: BatchRecord, target: Status, made: Mapping[str, FileRecord]
    ) -> None:
        """The last move. `made`: the file of each of `output` and `error` that has lines, kept
        already.

        Files and status change together: a batch shows its files when it has ended, never before.
        They are its owner's, who may have changed since the job began.
        """
        named = {f"{kind}_file_id": file.id for kind, file in made.items()}
        here = files.c.id.in_(list(named.values())), files.c.state == FileState.UPLOADING
        owner = select(batches.c.tenant).where(batches.c.id == batch.id).scalar_subquery()
        async with self._database.write() as connection:
            await self._owned(connection, batch.id, batch.owner)
            shown = await connection.execute(
                update(files).where(*here).values(state=FileState.READY, tenant=owner)
            )
            if shown.rowcount != len(made):
                raise LeaseLostError(f"files of {batch.id} were taken for leavings")
            await move(connection, batch, target, self._clock(), owner=None, **named)


def _ends(*columns: Any) -> Select[Any]:
    """The number of each line, and of it and its result, if it has one, these columns."""
    of_line = and_(results.c.batch_id == lines.c.batch_id, results.c.line_no == lines.c.line_no)
    return select(lines.c.line_no, *columns).outerjoin_from(lines, results, of_line)


def _needs_work() -> Any:
    leased = and_(lines.c.batch_id == batches.c.id, lines.c.state == LineState.LEASED)
    idle = ~exists().where(leased).correlate(batches)
    ready = or_(
        batches.c.status.in_([Status.VALIDATING, Status.FINALIZING]),
        and_(batches.c.status == Status.CANCELLING, idle),
        and_(batches.c.status == Status.IN_PROGRESS, batches.c.expiring.is_(True), idle),
        and_(batches.c.status == Status.IN_PROGRESS, batches.c.expiring.is_(False), _is_done()),
    )
    return and_(is_live(), ready)


def _is_done() -> Any:
    """Known of the batch itself: one with many lines is not read through to learn it."""
    return batches.c.completed + batches.c.failed >= batches.c.total
