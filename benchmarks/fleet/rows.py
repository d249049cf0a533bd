"""The same calls beside few and many stored lines, and what a line weighs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from fleet.bench import Bench, spread
from fleet.postgres_load import SIZES, ask
from fleet.replica import ANSWER, MODEL
from fleet.replicas import CHAT

from conserve.batch.batch_store import new_batch
from conserve.batch.executor import Reply
from conserve.batch.outcome import Result, from_reply
from conserve.batch.records import Line
from conserve.batch.schema import batches
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.wire import BatchCreate

Found = TypeVar("Found")

BATCH_LINES = 50_000
CALL_LINES = 64
WORKER = "worker-measured"
FILL = """
    INSERT INTO lines SELECT '{batch}', n, 'line-' || n, n * 500, 500, md5((n % 100)::text),
    'pending', NULL, 0, 0, 0 FROM generate_series(1, {lines}) n
"""


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    for num_lines in (10_000, 100_000, 1_000_000):
        database = bench.database()
        stored = asyncio.run(_measure(bench, database, num_lines))
        found = ask(bench.server.dsn(database), SIZES)
        yield {"lines": num_lines, **stored, "sizes": {row.pop("relname"): row for row in found}}


async def _measure(bench: Bench, database: str, num_lines: int) -> dict[str, Any]:
    folder = bench.folder / database
    settings = BatchSettings(data_dir=folder, database_url=bench.server.url(database))
    stores = Stores(settings, time.time)
    await stores.prepare()
    named = await _fill(stores, num_lines)
    await stores.workers.enlist(WORKER)
    try:
        return await _calls(stores, named, 20 if bench.quick else 100)
    finally:
        await stores.close()


async def _fill(stores: Stores, num_lines: int) -> list[str]:
    """Live batches of BATCH_LINES at most; returns their ids."""
    named = []
    async with stores.database.write() as connection:
        for start in range(0, num_lines, BATCH_LINES):
            size = min(BATCH_LINES, num_lines - start)
            wish = BatchCreate(input_file_id="file", endpoint=CHAT, completion_window="24h")
            row = new_batch("everybody", wish, None, size * 700, MODEL, time.time()).to_row()
            row |= {"status": "in_progress", "in_progress_at": time.time(), "has_lines": True}
            row |= {"total": size}
            await connection.execute(batches.insert().values(row))
            await connection.exec_driver_sql(FILL.format(batch=row["id"], lines=size))
            named.append(row["id"])
    async with stores.database.write() as connection:
        await connection.exec_driver_sql("ANALYZE")
    return named


async def _calls(stores: Stores, named: list[str], times: int) -> dict[str, Any]:
    """Each call of a feeding worker so often, by name: milliseconds."""
    taken: dict[str, list[tuple[float, int]]] = {}

    async def timed(name: str, call: Callable[[], Awaitable[Found]], size: int) -> Found:
        start = time.monotonic()
        result = await call()
        taken.setdefault(name, []).append((time.monotonic() - start, size))
        return result

    for turn in range(times):
        batch_id = named[turn % len(named)]
        await timed("waiting", lambda: stores.leases.waiting(50, [MODEL]), 0)
        await timed("jobs", lambda: stores.jobs.claim(WORKER, [MODEL]), 0)
        await timed("outlook", lambda: _outlook(stores), 0)
        claimed = await timed("claim", partial(_claim, stores, batch_id), CALL_LINES)
        done = [_result(line) for line in claimed]
        await timed("record", partial(stores.leases.record, WORKER, done), CALL_LINES)
    return {name: spread(calls) for name, calls in taken.items()}


async def _outlook(stores: Stores) -> None:
    stores.lookout.forget()
    await stores.lookout.outlook(time.time())


async def _claim(stores: Stores, batch_id: str) -> list[Line]:
    return await stores.leases.claim(WORKER, batch_id, CALL_LINES, 1 << 30, 50)


def _result(line: Line) -> Result:
    outcome = from_reply(line, Reply(200, ANSWER))
    assert isinstance(outcome, Result)
    return outcome
