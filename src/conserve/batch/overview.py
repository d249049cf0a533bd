"""All batches of the store in a few numbers, for those who watch the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func, select

from conserve.batch import deadlines
from conserve.batch.deadlines import LiveDeadlineState
from conserve.batch.lifecycle import LIVE, Status
from conserve.batch.schema import batches
from conserve.batch.stores import Stores


@dataclass(frozen=True, slots=True)
class Overview:
    """Of every tenant's batches in the store, those of other servers that share it included.

    completed, failed, input_tokens, output_tokens: since the store was made.
    live_completed, live_failed, live_remaining: lines of batches that have not ended.
    finish_s: seconds until the last of them is expected to end; None while nothing is known.
    """

    statuses: Mapping[Status, int]
    deadlines: Mapping[LiveDeadlineState, int]
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    live_completed: int
    live_failed: int
    live_remaining: int
    remaining_tokens: float
    harvest_tokens_per_s: float | None
    finish_s: float | None


async def overview(stores: Stores, now_s: float) -> Overview:
    """Raises StoreUnavailableError."""
    harvest = await stores.harvest.recent()
    ordered = deadlines.order(await stores.batches.views(), now_s, harvest)
    finishes = [deadlines.estimated_finish(v.batch_id, ordered, now_s, harvest) for v in ordered]
    known = [finish_at - now_s for finish_at in finishes if finish_at is not None]
    states = Counter(
        deadlines.deadline_state(view, finish_at, now_s, harvest)
        for view, finish_at in zip(ordered, finishes, strict=True)
    )
    rows = await _sums(stores)
    live = [row for status, row in rows.items() if status in LIVE]
    completed, failed = sum(row["completed"] for row in live), sum(row["failed"] for row in live)
    return Overview(
        statuses={status: row["batches"] for status, row in rows.items()},
        deadlines=states,
        **{name: sum(row[name] for row in rows.values()) for name in COUNTED},
        live_completed=completed,
        live_failed=failed,
        live_remaining=sum(row["total"] for row in live) - completed - failed,
        remaining_tokens=sum(view.remaining_tokens for view in ordered),
        harvest_tokens_per_s=harvest.tokens_per_s,
        finish_s=max(known) if known else None,
    )


COUNTED = ("completed", "failed", "input_tokens", "output_tokens")


async def _sums(stores: Stores) -> dict[Status, dict[str, int]]:
    names = (*COUNTED, "total")
    columns = [func.sum(batches.c[name]).label(name) for name in names]
    query = select(batches.c.status, func.count().label("batches"), *columns)
    async with stores.database.read() as connection:
        rows = (await connection.execute(query.group_by(batches.c.status))).mappings().all()
    return {
        Status(row["status"]): {name: int(row[name]) for name in (*names, "batches")}
        for row in rows
    }
