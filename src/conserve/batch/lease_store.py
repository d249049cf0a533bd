"""Lines: who holds which, and the results they come to.

Locks are always taken in the order worker, batch, lines, so that no two transactions wait for each
other. Only the counts of a batch are written after its lines: whoever does so holds the batch
already, beside others who do, and a claim, which keeps counts waiting, waits for no line itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import accumulate, groupby
from typing import Any

from sqlalchemy import Select, exists, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from conserve.batch.database import Database
from conserve.batch.due import is_due
from conserve.batch.lifecycle import LineState, Status
from conserve.batch.outcome import Outcome, Postponed, Result, Tokens
from conserve.batch.records import SUSPECT_LOSSES, Line
from conserve.batch.schema import batches, is_live, lines, of_models, results
from conserve.batch.share_store import ShareStore
from conserve.batch.usage_store import UsageStore
from conserve.batch.worker_store import hold_worker

# As the index has it, which holds few lines or none.
_HAS_LOSSES = text("lines.losses > 0")
# Databases bound the parameters of one statement, at about 32,000.
STATEMENT_ROWS = 500


class LeaseStore:
    """Raises LeaseLostError to a worker whose row is gone, and StoreUnavailableError."""

    def __init__(
        self,
        database: Database,
        clock: Callable[[], float],
        shares: ShareStore,
        usage: UsageStore,
        *,
        group_prefixes: bool = True,
    ) -> None:
        self._database = database
        self._shares = shares
        self._usage = usage
        self._clock = clock
        by_prefix = (lines.c.prefix_key,) if group_prefixes else ()
        self._line_order = (*by_prefix, lines.c.line_no)

    async def claim(
        self,
        worker_id: str,
        batch_id: str,
        limit: int,
        max_bytes: int,
        max_losses: int,
        *,
        suspects: bool = False,
    ) -> list[Line]:
        """Up to `limit` waiting lines of the batch, in the order set, now this worker's: as many as
        `max_bytes` hold, and one at least. Of `suspects` one, to be run alone; else none of them.

        Lines lost more than `max_losses` times are left to `worn_out`.
        """
        now = self._clock()
        async with self._database.write() as connection:
            await hold_worker(connection, worker_id)
            is_open = select(batches.c.id).where(batches.c.id == batch_id, *_may_start(now))
            if (await connection.execute(is_open.with_for_update(read=True))).first() is None:
                return []
            query = (
                _select_lines()
                .where(
                    lines.c.batch_id == batch_id,
                    lines.c.state == LineState.PENDING,
                    is_due(lines.c.not_before, now),
                    lines.c.losses <= max_losses,
                    *(_is_suspect() if suspects else (lines.c.losses < SUSPECT_LOSSES,)),
                )
                .order_by(*self._line_order)
                .limit(1 if suspects else min(limit, STATEMENT_ROWS))
                .with_for_update(skip_locked=True)
            )
            found = [Line(*row) for row in await connection.execute(query)]
            claimed = _within(found, max_bytes)
            await connection.execute(
                update(lines)
                .where(*_named(batch_id, claimed))
                .values(state=LineState.LEASED, owner=worker_id)
            )
            return claimed

    async def waiting(self, max_losses: int, models: Collection[str] | None = None) -> set[str]:
        """Batches of these models, or of any, with a line that may be claimed now."""
        now = self._clock()
        line = _claimable(now, max_losses, lines.c.batch_id == batches.c.id)
        return await self._open_batches(now, models, line.correlate(batches).exists())

    async def suspected(self, max_losses: int, models: Collection[str] | None = None) -> set[str]:
        """Those of them with a line that is to be run alone."""
        now = self._clock()
        found = _claimable(now, max_losses, *_is_suspect())
        return await self._open_batches(now, models, batches.c.id.in_(found))

    async def _open_batches(
        self, now: float, models: Collection[str] | None, has_line: Any
    ) -> set[str]:
        query = select(batches.c.id).where(*_may_start(now), of_models(models), has_line)
        async with self._database.read() as connection:
            return set((await connection.execute(query)).scalars())

    async def worn_out(self, max_losses: int) -> list[Line]:
        """Waiting lines that went down with their process too often to be tried again."""
        query = _select_lines().where(
            _HAS_LOSSES,
            lines.c.state == LineState.PENDING,
            lines.c.losses > max_losses,
            exists().where(batches.c.id == lines.c.batch_id, *_is_open()),
        )
        async with self._database.read() as connection:
            rows = await connection.execute(query.limit(STATEMENT_ROWS))
            return [Line(*row) for row in rows]

    async def record(self, worker_id: str | None, outcomes: Iterable[Outcome]) -> list[Result]:
        """Store what lines came to, each once: only lines the worker still holds are taken
        (or, with no worker, lines that wait). Returns the results that were stored."""
        stored = []
        for batch_id, group in _by_batch(outcomes):
            for part in _parts(group):
                async with self._database.write() as connection:
                    stored += await self._record(connection, worker_id, batch_id, part)
        return stored

    async def _record(
        self, connection: AsyncConnection, worker_id: str | None, batch_id: str, part: list[Outcome]
    ) -> list[Result]:
        """Rows that others write, too, come last: whoever holds one lets the others wait for as
        many answers of the database as are still to come."""
        billed = await _hold_batch(connection, worker_id, batch_id)
        if billed is None:
            return []
        held = await _hold_lines(connection, worker_id, batch_id, part)
        mine = [outcome for outcome in part if outcome.line.line_no in held]
        done = [outcome for outcome in mine if isinstance(outcome, Result)]
        for outcome in mine:
            if isinstance(outcome, Postponed):
                await _put_back(connection, outcome)
        if done:
            await _finish(connection, batch_id, done)
            tenant, model = billed
            await self._usage.count(connection, worker_id, tenant, model, done)
            await _count(connection, batch_id, done)
            await self._shares.charge(connection, tenant, done)
        return done

    async def give_back_others(self, worker_id: str, kept: Iterable[Line]) -> None:
        """Lines this worker holds without knowing, all but `kept`, go back to wait."""
        known = {(line.batch_id, line.line_no) for line in kept}
        mine = (lines.c.owner == worker_id, lines.c.state == LineState.LEASED)
        async with self._database.write() as connection:
            held = [Line(*row) for row in await connection.execute(_select_lines().where(*mine))]
            strays = [line for line in held if (line.batch_id, line.line_no) not in known]
            for line in strays:
                await connection.execute(
                    update(lines)
                    .where(*_named(line.batch_id, [line]), *mine)
                    .values(state=LineState.PENDING, owner=None)
                )

    async def closed(self, batch_ids: Iterable[str]) -> set[str]:
        """Those of the batches whose lines must not run any more."""
        wanted = set(batch_ids)
        query = select(batches.c.id).where(batches.c.id.in_(sorted(wanted)), *_is_open())
        async with self._database.read() as connection:
            return wanted - set((await connection.execute(query)).scalars())


def _is_suspect() -> tuple[Any, Any]:
    return _HAS_LOSSES, lines.c.losses >= SUSPECT_LOSSES


def _claimable(now: float, max_losses: int, *more: Any) -> Select[Any]:
    """Batches of lines that may be claimed now, one row a line."""
    return select(lines.c.batch_id).where(
        lines.c.state == LineState.PENDING,
        is_due(lines.c.not_before, now),
        lines.c.losses <= max_losses,
        *more,
    )


def _within(found: list[Line], max_bytes: int) -> list[Line]:
    """The first lines that fit, and the very first in any case."""
    ends = list(accumulate(line.length for line in found))
    return found[: max(1, bisect_right(ends, max_bytes))]


def _is_open() -> tuple[Any, Any, Any]:
    """Of a batch: its lines may run."""
    return is_live(), batches.c.status == Status.IN_PROGRESS, batches.c.expiring.is_(False)


def _may_start(now: float) -> tuple[Any, ...]:
    """Of a batch: its lines may begin to run."""
    return *_is_open(), batches.c.expires_at > now, batches.c.paused_at.is_(None)


def _named(batch_id: str, named: Iterable[Line]) -> tuple[Any, Any]:
    return lines.c.batch_id == batch_id, lines.c.line_no.in_([line.line_no for line in named])


def _select_lines() -> Select[Any]:
    """Rows that `Line` takes as they are."""
    return select(*(lines.c[name] for name in Line.__struct_fields__))


def _by_batch(outcomes: Iterable[Outcome]) -> Iterator[tuple[str, list[Outcome]]]:
    ordered = sorted(outcomes, key=lambda outcome: (outcome.line.batch_id, outcome.line.line_no))
    for batch_id, group in groupby(ordered, key=lambda outcome: outcome.line.batch_id):
        yield batch_id, list(group)


def _parts(group: list[Outcome]) -> Iterator[list[Outcome]]:
    for start in range(0, len(group), STATEMENT_ROWS):
        yield group[start : start + STATEMENT_ROWS]


async def _hold_batch(
    connection: AsyncConnection, worker_id: str | None, batch_id: str
) -> tuple[str, str | None] | None:
    """Keep the batch from being deleted or handed over; returns whose it is, and of which model;
    None when it is gone.

    Any number of workers may hold it so, each for lines of its own. Lines that nobody holds do not
    keep their batch from being assembled: without a worker it is held alone, and has to be open.
    """
    query = select(batches.c.tenant, batches.c.model).where(batches.c.id == batch_id)
    if worker_id is None:
        query = query.where(*_is_open()).with_for_update()
    else:
        query = query.with_for_update(read=True, key_share=True)
    row = (await connection.execute(query)).first()
    return None if row is None else (row[0], row[1])


async def _hold_lines(
    connection: AsyncConnection, worker_id: str | None, batch_id: str, part: list[Outcome]
) -> set[int]:
    """Numbers of those lines that are still the worker's, or that wait where there is none."""
    state = LineState.PENDING if worker_id is None else LineState.LEASED
    query = select(lines.c.line_no).where(
        *_named(batch_id, [outcome.line for outcome in part]),
        lines.c.state == state,
        lines.c.owner.is_not_distinct_from(worker_id),
    )
    return set((await connection.execute(query.with_for_update())).scalars())


async def _put_back(connection: AsyncConnection, postponed: Postponed) -> None:
    await connection.execute(
        update(lines)
        .where(*_named(postponed.line.batch_id, [postponed.line]))
        .values(
            state=LineState.PENDING,
            owner=None,
            not_before=postponed.not_before,
            attempts=lines.c.attempts + int(postponed.counted),
            losses=lines.c.losses + postponed.losses,
        )
    )


async def _finish(connection: AsyncConnection, batch_id: str, done: list[Result]) -> None:
    await connection.execute(
        update(lines)
        .where(*_named(batch_id, [result.line for result in done]))
        .values(state=LineState.DONE, owner=None)
    )
    rows = [
        {
            "batch_id": batch_id,
            "line_no": result.line.line_no,
            "failed": result.failed,
            "payload": result.payload,
        }
        for result in done
    ]
    await connection.execute(insert(results), rows)


async def _count(connection: AsyncConnection, batch_id: str, done: list[Result]) -> None:
    failed = sum(result.failed for result in done)
    tokens = sum((result.tokens for result in done), Tokens())
    await connection.execute(
        update(batches)
        .where(batches.c.id == batch_id)
        .values(
            failed=batches.c.failed + failed,
            completed=batches.c.completed + len(done) - failed,
            input_tokens=batches.c.input_tokens + tokens.input,
            cached_tokens=batches.c.cached_tokens + tokens.cached,
            output_tokens=batches.c.output_tokens + tokens.output,
            reasoning_tokens=batches.c.reasoning_tokens + tokens.reasoning,
        )
    )
