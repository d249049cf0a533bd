"""A paused batch: no line of it begins, those in flight end, and its time goes on."""

from __future__ import annotations

import time
from typing import Any

import pytest

from conserve.batch.deadlines import BatchView, RecentHarvest
from conserve.batch.demand import due_tokens_per_s
from conserve.batch.errors import InvalidRequestError, NotFoundError
from conserve.batch.lifecycle import Status
from conserve.batch.outlook import Outlook
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.waits import Waits
from tests.batch.batch_fakes import FakeClock, FakeModel, Running, eventually, running
from tests.batch.builders import TENANT, numbered
from tests.batch.test_batch_contract import MANY, batch_in_progress, claim, counts, done

pytestmark = pytest.mark.anyio


async def test_no_line_begins_and_those_in_flight_end(stores: Stores, clock: FakeClock) -> None:
    batch_id = await batch_in_progress(stores, 3)
    await stores.workers.enlist("w")
    held = await claim(stores, "w", batch_id, limit=1)
    paused = await stores.batches.pause(TENANT, batch_id)
    assert (paused.paused_at, paused.status) == (clock(), Status.IN_PROGRESS)
    assert await stores.leases.waiting(MANY) == set()
    assert await claim(stores, "w", batch_id) == []
    assert await stores.leases.closed([batch_id]) == set()  # what runs is not stopped
    assert len(await stores.leases.record("w", done(held))) == 1
    clock.advance(10)
    assert (await stores.batches.pause(TENANT, batch_id)).paused_at == paused.paused_at
    for _ in range(2):
        assert (await stores.batches.resume(TENANT, batch_id)).paused_at is None
    assert await stores.leases.waiting(MANY) == {batch_id}
    await stores.leases.record("w", done(await claim(stores, "w", batch_id)))
    assert await counts(stores, batch_id) == (3, 3, 0)


async def test_its_time_goes_on(stores: Stores, clock: FakeClock) -> None:
    batch_id = await batch_in_progress(stores, 3, completion_window="1h")
    await stores.batches.pause(TENANT, batch_id)
    clock.advance(3601)
    await stores.jobs.expire()
    await stores.workers.enlist("w")
    job = await stores.jobs.claim("w")
    assert job is not None
    assert job.id == batch_id
    with pytest.raises(InvalidRequestError, match="Cannot resume a batch with status"):
        await stores.batches.resume(TENANT, batch_id)


async def test_it_is_its_owners(stores: Stores) -> None:
    batch_id = await batch_in_progress(stores)
    with pytest.raises(NotFoundError):
        await stores.batches.pause("another", batch_id)


def test_others_are_not_told_to_wait_for_it() -> None:
    one = BatchView("one", 0.0, 10, 1000.0, 50_000.0, "m", num_left=50, tenant="t", is_paused=True)
    two = BatchView("two", 1.0, 10, 9000.0, 1000.0, "m", num_left=10, tenant="t")
    seen = Outlook.over([one, two], 0.0, RecentHarvest(100.0, 10.0)).prospects
    assert (seen["two"].finish_at, seen["one"].finish_at) == (10.0, None)
    assert seen["one"].state == "unknown"
    assert Waits().longest_s([one], 500.0) == 0.0  # it does not starve
    assert due_tokens_per_s([one], 0.0) == 0.0  # and no server is added for it


async def ask(run: Running, batch_id: str, verb: str, status: int = 200) -> Any:
    response = await run.http.post(f"/v1/batches/{batch_id}/{verb}")
    assert response.status_code == status, response.text
    return response.json()


async def test_a_pause_outlives_the_server(settings: BatchSettings) -> None:
    model = FakeModel()
    model.open.clear()
    settings = settings.model_copy(update={"max_in_flight": 2, "drain_s": 60.0})
    async with running(settings, model) as run:
        batch = await run.submit(numbered(6))
        await eventually(lambda: model.running == 2)
        told = await ask(run, batch.id, "pause")
        assert told["status"] == "in_progress"
        assert abs(told["paused_at"] - time.time()) < 3600
        model.open.set()
    later = FakeModel()
    async with running(settings, later) as run:
        other = await run.submit(numbered(3))
        await run.until(other.id, "completed")
        batch = await run.client.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        assert (batch.status, batch.request_counts.completed) == ("in_progress", 2)
        assert (await ask(run, batch.id, "resume"))["paused_at"] is None
        batch = await run.until(batch.id, "completed")
        assert batch.request_counts.completed == 6
        refused = await ask(run, batch.id, "pause", status=400)
        assert refused["error"]["code"] == "batch_not_pausable"
        await ask(run, "batch_" + 32 * "0", "resume", status=404)
    assert (sum(model.seen.values()), sum(later.seen.values())) == (2, 4 + 3)


async def test_a_paused_batch_can_be_cancelled(settings: BatchSettings) -> None:
    model = FakeModel()
    model.open.clear()
    async with running(settings, model) as run:
        batch = await run.submit(numbered(4))
        await ask(run, batch.id, "pause")
        await run.client.batches.cancel(batch.id)
        model.open.set()
        ended = await run.until(batch.id, "cancelled")
        assert ended.paused_at is None


async def test_a_careless_claim_is_noticed(
    stores: Stores, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a claim that does not look at the pause."""
    from conserve.batch import lease_store

    monkeypatch.setattr(lease_store, "_may_start", lambda _now: lease_store._is_open())
    with pytest.raises(AssertionError):
        await test_no_line_begins_and_those_in_flight_end(stores, clock)
