"""What a key's lines came to by day: every line once, whoever runs it and whatever is deleted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conserve.batch.executor import Reply
from conserve.batch.outcome import Postponed, keep_reply
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.usage_store import DAY_S, DayUsage
from conserve.cli.batch_view import print_usage
from tests.batch.batch_fakes import FakeClock, FakeModel, running
from tests.batch.builders import TENANT, jsonl, line
from tests.batch.test_batch_contract import OK, batch_in_progress, claim, done

pytestmark = pytest.mark.anyio


async def days(stores: Stores, tenant: str | None = TENANT) -> list[DayUsage]:
    return await stores.usage.days(0, 10**6, tenant)


async def test_each_line_counts_once_on_the_day_it_is_stored(
    stores: Stores, clock: FakeClock
) -> None:
    clock.now_s = 100.0 * DAY_S
    batch_id = await batch_in_progress(stores, 4)
    for worker in ("dies", "lives"):
        await stores.workers.enlist(worker)
    lost = await claim(stores, "dies", batch_id)
    assert await stores.workers.bury("dies", only_overdue=False)
    held = await claim(stores, "lives", batch_id)
    assert await stores.leases.record("dies", done(lost)) == []  # it comes too late
    refused = keep_reply(held[1], Reply(400, b"{}"))
    await stores.leases.record("lives", [keep_reply(held[0], OK), refused])
    await stores.leases.record("lives", [keep_reply(held[0], OK)])  # and once more
    await stores.leases.record("lives", [Postponed(held[2], 0.0, counted=True)])
    clock.advance(DAY_S)
    await stores.leases.record("lives", [keep_reply(held[3], OK)])
    assert await days(stores) == [
        DayUsage(TENANT, 100, 1, 1, 3, 0, 2, 0),
        DayUsage(TENANT, 101, 1, 0, 3, 0, 2, 0),
    ]
    assert await stores.usage.days(101, 101) == [DayUsage(TENANT, 101, 1, 0, 3, 0, 2, 0)]


async def test_it_stays_when_all_is_deleted_or_moved(stores: Stores) -> None:
    batch_id = await batch_in_progress(stores, 3)
    await stores.workers.enlist("w")
    await stores.leases.record("w", done(await claim(stores, "w", batch_id)))
    before = await days(stores)
    assert [each.completed for each in before] == [3]
    await stores.owners.move(TENANT, "another")
    await stores.owners.delete("another")
    assert await days(stores, None) == before


async def test_a_key_sees_its_own(settings: BatchSettings, capsys: Any) -> None:
    model = FakeModel(api_keys=["mine", "theirs"])
    async with running(settings, model) as run:
        content = jsonl([line("a"), line("b"), line("bad", "fail:400:9:x")])
        await run.until((await run.submit(content)).id, "completed")
        found = (await run.http.get("/v1/batches/usage")).json()["data"]
        usage = [day["usage"] for day in found]  # of two days where midnight comes between
        assert sum(day["completed"] for day in found) == 2
        assert sum(day["failed"] for day in found) == 1
        assert sum(one["input_tokens"] for one in usage) == 6
        assert sum(one["output_tokens"] for one in usage) == 4
        assert sum(one["input_tokens_details"]["cached_tokens"] for one in usage) == 2
        other = await run.http.get(
            "/v1/batches/usage?days=1", headers={"authorization": "Bearer theirs"}
        )
        assert other.json() == {"object": "list", "data": []}
        refused = await run.http.get("/v1/batches/usage?days=0")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "days")
    print_usage(found)
    assert found[0]["date"] in capsys.readouterr().out
    assert json.dumps(found)
