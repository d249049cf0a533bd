"""Many batches and many lines: what is looked at again and again reads only what it needs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy import event, text

from conserve.batch.batch_store import new_batch
from conserve.batch.deadlines import BatchView
from conserve.batch.lifecycle import Status
from conserve.batch.lookout import FRESH_S, Lookout
from conserve.batch.overview import overview
from conserve.batch.records import BatchRecord
from conserve.batch.schema import batches, files, lines
from conserve.batch.stores import Stores
from conserve.batch.wire import BatchCreate
from tests.batch.batch_fakes import FakeClock
from tests.batch.builders import TENANT, batch_body, numbered, stored_file

pytestmark = pytest.mark.anyio

NUM_ENDED, NUM_FILES, NUM_LIVE, NUM_LINES = 3000, 3000, 20, 200
RUNNING = {"status": Status.IN_PROGRESS, "in_progress_at": 0.0, "has_lines": True}
BUSY = ("batches", "lines", "results", "files")


async def fill(stores: Stores, now_s: float) -> None:
    """A store in use for long: many batches and files, few of them live and none to be deleted."""
    file = await stored_file(stores, numbered(1))
    request = BatchCreate(**batch_body(file.id))
    over = [replace(batch_of(request, now_s), status=Status.COMPLETED) for _ in range(NUM_ENDED)]
    live = [replace(batch_of(request, now_s), **RUNNING) for _ in range(NUM_LIVE)]
    put_down = {"custom_id": "", "offset": 0, "length": 1, "prefix_key": "", "state": "pending"}
    put_down |= {"not_before": 0.0, "attempts": 0, "losses": 0}
    numbers = range(1, NUM_LINES + 1)
    rows = [{**put_down, "batch_id": one.id, "line_no": n} for one in live for n in numbers]
    async with stores.database.write() as connection:
        await connection.execute(batches.insert(), [one.to_row() for one in live + over])
        await connection.execute(lines.insert(), rows)
        kept = [replace(file, id=f"file-{n:032x}").to_row() for n in range(NUM_FILES)]
        await connection.execute(files.insert(), kept)
    async with stores.database.write() as connection:
        await connection.execute(text("ANALYZE"))


def batch_of(request: BatchCreate, now_s: float) -> BatchRecord:
    return new_batch(TENANT, request, None, 100, "m", now_s)


@contextmanager
def heard(stores: Stores) -> Any:
    """Statements that are sent meanwhile, with their parameters."""
    said: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        said.append((statement, parameters))

    engine = stores.database._engine.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield said
    finally:
        event.remove(engine, "before_cursor_execute", note)


async def look_again_and_again(stores: Stores, now_s: float) -> None:
    """All that every worker and server does while nothing happens."""
    await stores.jobs.expire()
    await stores.leases.worn_out(50)
    await stores.ended.clear_lines()
    await stores.jobs.claim("w", ["m"])
    await stores.leases.waiting(50, ["m"])
    await stores.leases.suspected(50, ["m"])
    await stores.workers.heartbeat("w")
    await stores.workers.overdue()
    await stores.files.collect()
    await stores.webhooks.deliver()
    await overview(stores, now_s)


async def plan(stores: Stores, statement: str, parameters: Any) -> str:
    async with stores.database.read() as connection:
        explain = "EXPLAIN QUERY PLAN " if stores.database.is_sqlite else "EXPLAIN "
        rows = await connection.exec_driver_sql(explain + statement, parameters)
        return "\n".join(str(row[-1]) for row in rows)


def scans(plan_text: str) -> list[str]:
    """Tables that the plan reads from end to end."""
    found = []
    for step in plan_text.splitlines():
        words = step.replace("Seq Scan on", "SCAN").split()
        # SQLite's own indexes, of primary keys, have a row for each of the table's.
        all_rows = "USING" not in words or "sqlite_autoindex" in step
        if "SCAN" in words and all_rows and "CONSTANT" not in words:
            found.append(words[words.index("SCAN") + 1])
    return found


async def test_idle_looks_scan_no_table_that_grows(stores: Stores, clock: FakeClock) -> None:
    await fill(stores, clock())
    await stores.workers.enlist("w")
    with heard(stores) as said:
        await look_again_and_again(stores, clock())
    looked_at = [one for one in said if one[0].startswith(("SELECT", "UPDATE", "DELETE"))]
    assert len(looked_at) >= 9
    for statement, parameters in looked_at:
        plan_text = await plan(stores, statement, parameters)
        assert not set(scans(plan_text)) & set(BUSY), f"{statement}\n{plan_text}"


async def test_a_scan_is_noticed(stores: Stores, clock: FakeClock) -> None:
    """Negative control: all pending lines, looked through."""
    await fill(stores, clock())
    statement = "SELECT line_no FROM lines WHERE state = 'pending' AND not_before > 5"
    assert scans(await plan(stores, statement, ())) == ["lines"]


class Counted:
    """A store that counts how often it is asked for all live batches."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self.num_looks = 0

    async def views(self) -> list[BatchView]:
        self.num_looks += 1
        return await self._stores.batches.views()


async def test_live_batches_are_reckoned_once_a_second(stores: Stores, clock: FakeClock) -> None:
    await fill(stores, clock())
    counted, watch = Counted(stores), FakeClock()
    lookout = Lookout(counted, stores.harvest, stores.shares, watch)  # type: ignore[arg-type]
    for _ in range(50):
        assert len((await lookout.outlook(clock())).prospects) == NUM_LIVE
    assert counted.num_looks == 1
    watch.advance(FRESH_S)
    await lookout.outlook(clock())
    lookout.forget()
    await lookout.outlook(clock())
    await lookout.outlook(clock() + 3600)
    assert counted.num_looks == 4


async def test_what_changes_during_a_look_is_seen_by_the_next(
    stores: Stores, clock: FakeClock
) -> None:
    lookout = Lookout(stores.batches, stores.harvest, stores.shares, FakeClock())
    recent = stores.harvest.recent

    async def and_a_batch_is_made() -> Any:
        lookout.forget()
        return await recent()

    stores.harvest.recent = and_a_batch_is_made  # type: ignore[method-assign]
    await lookout.outlook(clock())
    stores.harvest.recent = recent  # type: ignore[method-assign]
    await fill(stores, clock())
    assert len((await lookout.outlook(clock())).prospects) == NUM_LIVE
