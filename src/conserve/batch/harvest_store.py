"""How much offline work got lately, kept in the database so that every server knows."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import delete, func, insert, select, update

from conserve.batch.database import Database
from conserve.batch.deadlines import RecentHarvest
from conserve.batch.outcome import Tokens
from conserve.batch.schema import harvest, workers

RECENT_MINUTES = 60
# Less than this much work says little about a rate.
LEAST_BUSY_S = 1.0


class HarvestStore:
    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def add(self, worker_id: str, requests: int, tokens: Tokens, busy_s: float) -> None:
        """Count results a worker stored, and the seconds it had lines in flight for them."""
        minute = int(self._clock() // 60)
        here = (harvest.c.worker_id == worker_id, harvest.c.minute == minute)
        async with self._database.write() as connection:
            changed = await connection.execute(
                update(harvest)
                .where(*here)
                .values(
                    requests=harvest.c.requests + requests,
                    tokens=harvest.c.tokens + tokens.total,
                    output_tokens=harvest.c.output_tokens + tokens.output,
                    busy_s=harvest.c.busy_s + busy_s,
                )
            )
            if changed.rowcount == 0:
                row = {
                    "worker_id": worker_id,
                    "minute": minute,
                    "requests": requests,
                    "tokens": tokens.total,
                    "output_tokens": tokens.output,
                    "busy_s": busy_s,
                }
                await connection.execute(insert(harvest).values(row))
                await connection.execute(
                    delete(harvest).where(harvest.c.minute < minute - RECENT_MINUTES)
                )

    async def recent(self) -> RecentHarvest:
        """The last hour's harvest: one worker's mean rate while busy, times the living workers."""
        since = int(self._clock() // 60) - RECENT_MINUTES
        sums = select(
            func.sum(harvest.c.tokens),
            func.sum(harvest.c.busy_s),
            func.sum(harvest.c.output_tokens),
            func.sum(harvest.c.requests),
        ).where(harvest.c.minute >= since)
        async with self._database.read() as connection:
            tokens, busy_s, output, requests = (await connection.execute(sums)).one()
            alive = (await connection.execute(select(func.count()).select_from(workers))).scalar()
        if not tokens or busy_s < LEAST_BUSY_S:
            return RecentHarvest()
        num_workers = max(1, alive or 0)
        rate = float(tokens) / float(busy_s) * num_workers
        mean_output = float(output) / float(requests) if requests else None
        return RecentHarvest(rate, mean_output, num_workers)
