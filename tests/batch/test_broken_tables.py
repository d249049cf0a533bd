"""Tables that are away under a running server, as while they are restored: what is done again and
again goes on when they are back, and says so once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import text

from conserve.batch.schema import day_usage, ended, lines, results, workers
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.usage_store import Counts
from conserve.server.batches import metrics
from conserve.server.usage.bill import Bill
from tests.batch.batch_fakes import FakeClock, FakeModel, eventually, running
from tests.batch.builders import numbered

pytestmark = pytest.mark.anyio

AWAY = "away"
ONE = Counts(completed=1)


async def rename(stores: Stores, table: str, name: str) -> None:
    async with stores.database.write() as connection:
        await connection.execute(text(f"ALTER TABLE {table} RENAME TO {name}"))


async def num_billed(stores: Stores) -> int:
    return sum(day.counts.completed for day in await stores.usage.days(0, 10**6))


def counted(place: Any, name: str, patch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each call of what `place` has under that name."""
    calls, original = list[None](), getattr(place, name)

    async def call(*arguments: Any) -> Any:
        calls.append(None)
        return await original(*arguments)

    patch.setattr(place, name, call)
    return calls


async def test_usage_waits_for_its_table(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("conserve.server.usage.bill.EVERY_S", 0.01)
    tries = counted(stores.usage, "put", monkeypatch)
    bill = Bill(stores, "m", by_key=False)
    async with bill.kept():
        await rename(stores, day_usage.name, AWAY)
        bill._count(bill.open("everybody"), ONE)
        await eventually(lambda: len(tries) > 2)
        await rename(stores, AWAY, day_usage.name)
        await eventually(lambda: bill._ledger.num_waiting == 0)
    assert await num_billed(stores) == 1
    assert caplog.text.count("usage waits to be stored") == 1


async def test_a_second_outage_is_said_again(
    stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    bill = Bill(stores, "m", by_key=False)
    for number in (1, 2):
        await rename(stores, day_usage.name, AWAY)
        bill._count(bill.open("everybody"), ONE)
        await bill.save()
        await bill.save()
        assert caplog.text.count("usage waits to be stored") == number
        await rename(stores, AWAY, day_usage.name)
        await bill.save()
        assert await num_billed(stores) == number


async def test_what_is_left_is_saved_however_the_server_ends(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the task that saves has died."""

    async def die(_: Bill) -> None:
        raise RuntimeError("gone")

    async def serve(bill: Bill) -> None:
        async with bill.kept():
            bill._count(bill.open("everybody"), ONE)
            await eventually(lambda: "conserve-usage has ended" in caplog.text)
            raise ValueError("of the app's")

    monkeypatch.setattr(Bill, "_save_for_ever", die)
    with pytest.raises(ValueError, match="of the app's"):
        await serve(Bill(stores, "m", by_key=False))
    assert await num_billed(stores) == 1


async def test_a_task_that_has_died_keeps_nobody_from_leaving(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(_: Bill) -> None:
        raise RuntimeError("gone")

    monkeypatch.setattr(Bill, "_save_for_ever", die)
    async with Bill(stores, "m", by_key=False).kept():
        await asyncio.sleep(0)


@pytest.mark.parametrize("table", [lines.name, results.name, workers.name])
async def test_lines_wait_for_tables_that_are_away(
    tmp_path: Path,
    database_url: str,
    table: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whichever is away: no try of a line counts, and nothing is said again and again."""
    monkeypatch.setattr("conserve.batch.dispatcher.STORE_RETRY_S", 0.01)
    settings = BatchSettings(
        data_dir=tmp_path, database_url=database_url, poll_s=0.01, max_attempts=1
    )
    model = FakeModel()
    model.open.clear()
    async with running(settings, model) as run:
        batch = await run.submit(numbered(40))
        await eventually(lambda: model.running > 0)
        records = counted(run.service.stores.leases, "record", monkeypatch)
        turns = counted(run.service.stores.leases, "suspected", monkeypatch)
        await rename(run.service.stores, table, AWAY)
        model.open.set()
        tries = turns if table == workers.name else records
        await eventually(lambda: len(tries) > 5)
        await rename(run.service.stores, AWAY, table)
        batch = await run.until(batch.id, "completed")
        assert (batch.request_counts.completed, batch.request_counts.failed) == (40, 0)
    assert set(model.seen.values()) == {1}
    said = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
    assert all("does not answer" in each for each in said)
    for what in ("feeding pauses", "results wait"):
        assert sum(each.startswith(what) for each in said) <= 1


async def test_metrics_go_on(
    stores: Stores,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    looks = counted(metrics, "overview", monkeypatch)
    registry = CollectorRegistry()

    async def looked(times: int) -> None:
        before = len(looks)
        await eventually(lambda: len(looks) > before + times)

    def failed() -> float | None:
        return registry.get_sample_value("conserve:batches", {"status": "failed"})

    async with metrics.batch_metrics(stores, clock, registry=registry, every_s=0.01):
        await eventually(lambda: failed() == 0)
        await rename(stores, ended.name, AWAY)
        await looked(3)
        await rename(stores, AWAY, ended.name)
        row = dict.fromkeys(ended.c.keys(), 0) | {"status": "failed", "num_batches": 7}
        async with stores.database.write() as connection:
            # Each status has a row from the first migration on.
            await connection.execute(ended.delete().where(ended.c.status == "failed"))
            await connection.execute(ended.insert().values(row))
        await eventually(lambda: failed() == 7)
    assert caplog.text.count("the figures of batches stay as they were") == 1
