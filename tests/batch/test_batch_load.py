"""How much workers ask of a database that is everybody's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from conserve.batch import database as database_module
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.worker import Worker
from tests.batch.batch_fakes import FakeClock
from tests.batch.batch_postgres import Postgres
from tests.batch.test_batch_many import heard

pytestmark = pytest.mark.anyio


async def listen(stores: Stores) -> list[str]:
    """What the connection that is used next is told from here on, but for prepared statements."""
    said: list[str] = []
    async with stores.database.read() as connection:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        raw.add_query_logger(lambda record: said.append(record.query))
    return said


async def test_a_look_is_one_statement(shared: Stores) -> None:
    said = await listen(shared)
    with heard(shared) as prepared:
        await shared.batches.views()
    assert (len(prepared), said) == (1, [])


async def test_a_connection_that_was_not_used_for_long_is_asked_first(
    shared: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = await listen(shared)
    monkeypatch.setattr(database_module, "SURELY_THERE_S", 0.0)
    await shared.batches.views()
    assert said == ["BEGIN;", ";", "ROLLBACK;"]


async def test_a_database_that_was_started_anew_is_no_outage(
    shared: Stores, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "SURELY_THERE_S", 0.0)
    await asyncio.gather(*(shared.batches.views() for _ in range(3)))
    await asyncio.to_thread(postgres.halt)
    await asyncio.to_thread(postgres.resume)
    assert await shared.batches.views() == []
    await shared.workers.enlist("w")


def worker(settings: BatchSettings, stores: Any = None) -> Worker:
    nobody: Any = None
    return Worker(stores, settings, nobody, nobody, nobody, nobody, FakeClock())


@pytest.mark.parametrize("num_workers", [1, 10, 1000])
def test_workers_share_the_looks_that_any_may_take(tmp_path: Path, num_workers: int) -> None:
    """As many a second as one takes alone, or what comes of one each a heartbeat."""
    settings = BatchSettings(data_dir=tmp_path, poll_s=0.5, lease_s=30)
    one = worker(settings)
    one._num_workers = num_workers
    turns_s = [one._turn_s() for _ in range(2000)]
    assert max(turns_s) <= 1.5 * settings.lease_s / 3
    looks_per_s = num_workers * len(turns_s) / sum(turns_s)
    assert looks_per_s == pytest.approx(max(1 / settings.poll_s, num_workers / 10), rel=0.05)
    assert num_workers == 1 or min(turns_s) < 0.6 * max(turns_s)


async def test_a_heartbeat_counts_the_workers(shared: Stores, tmp_path: Path) -> None:
    one = worker(BatchSettings(data_dir=tmp_path), shared)
    for name in ("one", "two", "three"):
        await shared.workers.enlist(name)
    await one._beat("one")
    assert one._num_workers == 3
    await shared.workers.retire("three")
    await one._beat("one")
    assert one._num_workers == 2
