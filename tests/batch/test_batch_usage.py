"""What a key's requests came to by day, class and model: each once, whoever counts it, however
often it is written, and whatever is deleted."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict
from sqlalchemy import func, insert, select
from typer.testing import CliRunner

from conserve.batch.errors import StoreUnavailableError
from conserve.batch.executor import Reply
from conserve.batch.outcome import Postponed, keep_reply
from conserve.batch.schema import day_usage, usage
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.usage_ledger import UsageLedger
from conserve.batch.usage_store import DAY_S, Billed, Counts, DayUsage
from conserve.cli.main import app
from tests.batch.batch_fakes import FakeClock, FakeModel, running
from tests.batch.builders import MODEL, TENANT, jsonl, line
from tests.batch.test_batch_contract import OK, batch_in_progress, claim, done
from tests.batch.test_batch_many import heard, plan, scans

pytestmark = pytest.mark.anyio

CHAT = Billed("key", "online", "m")
ONE = Counts(completed=1, input_tokens=10, cached_tokens=4, output_tokens=3)
MANY = Counts(*(1000 * each for each in (1, 0, 10, 4, 3, 0)))


async def days(stores: Stores, tenant: str | None = TENANT) -> list[DayUsage]:
    return await stores.usage.days(0, 10**6, tenant)


async def total(stores: Stores) -> Counts:
    return sum((each.counts for each in await days(stores, None)), Counts())


async def num_rows(stores: Stores) -> int:
    async with stores.database.read() as connection:
        rows = await connection.execute(select(func.count()).select_from(day_usage))
        return int(rows.scalar_one())


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
    lines = (await days(stores))[0].billed
    assert lines[:2] == (TENANT, "batch")
    assert await days(stores) == [
        DayUsage(100, lines, Counts(1, 1, 3, 0, 2, 0)),
        DayUsage(101, lines, Counts(1, 0, 3, 0, 2, 0)),
    ]
    assert await stores.usage.days(101, 101) == [DayUsage(101, lines, Counts(1, 0, 3, 0, 2, 0))]


async def test_it_stays_when_all_is_deleted_or_moved(stores: Stores) -> None:
    batch_id = await batch_in_progress(stores, 3)
    await stores.workers.enlist("w")
    await stores.leases.record("w", done(await claim(stores, "w", batch_id)))
    before = await days(stores)
    assert [each.counts.completed for each in before] == [3]
    await stores.owners.move(TENANT, "another")
    await stores.owners.delete("another")
    assert await days(stores, None) == before


async def test_a_ledgers_counts_are_there_once_they_are_saved(stores: Stores) -> None:
    ledger = UsageLedger(stores.usage, "w")
    for _ in range(3):
        ledger.add(CHAT, ONE)
    assert (await days(stores, None), ledger.num_waiting) == ([], 3)
    await ledger.save()
    ledger.add(CHAT, ONE)
    ledger.add(CHAT._replace(request_class="flex"), ONE)
    await ledger.save()
    await ledger.save()
    found = {day.billed.request_class: day.counts for day in await days(stores, "key")}
    assert found == {"online": Counts(4, 0, 40, 16, 12, 0), "flex": ONE}
    assert ledger.num_waiting == 0


@pytest.mark.parametrize("is_committed", [False, True])
async def test_a_try_of_which_nobody_knows_counts_once(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, *, is_committed: bool
) -> None:
    """The connection broke while it was committed: before, or after."""
    await breaking_off(stores, monkeypatch, is_committed=is_committed)
    assert await total(stores) == Counts(3, 0, 30, 12, 9, 0)


async def test_control_to_add_instead_counts_it_twice(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = stores.usage._write

    async def adding(connection: Any, writer: str, found: Any, *, on_top: bool) -> None:
        await write(connection, writer, found, on_top=True)

    monkeypatch.setattr(stores.usage, "_write", adding)
    await breaking_off(stores, monkeypatch, is_committed=True)
    assert (await total(stores)).completed > 3


async def breaking_off(stores: Stores, monkeypatch: Any, *, is_committed: bool) -> None:
    """Three requests, one of them in a try that fails and is made again with the next."""
    ledger, put = UsageLedger(stores.usage, "w"), stores.usage.put

    async def breaks(*arguments: Any) -> None:
        if is_committed:
            await put(*arguments)
        raise StoreUnavailableError("gone")

    ledger.add(CHAT, ONE)
    await ledger.save()
    ledger.add(CHAT, ONE)
    with monkeypatch.context() as patched:
        patched.setattr(stores.usage, "put", breaks)
        with pytest.raises(StoreUnavailableError):
            await ledger.save()
    ledger.add(CHAT, ONE)
    await ledger.save()


async def test_what_is_in_doubt_at_midnight_stays_on_its_day(
    stores: Stores, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.now_s = 101.0 * DAY_S - 1
    put = stores.usage.put

    async def commits_and_breaks(*arguments: Any) -> None:
        await put(*arguments)
        raise StoreUnavailableError("gone")

    ledger = UsageLedger(stores.usage, "w")
    ledger.add(CHAT, ONE)
    with monkeypatch.context() as patched:
        patched.setattr(stores.usage, "put", commits_and_breaks)
        with pytest.raises(StoreUnavailableError):
            await ledger.save()
    clock.advance(2)
    await ledger.save()
    ledger.add(CHAT, ONE)
    await ledger.save()
    assert await days(stores, "key") == [DayUsage(100, CHAT, ONE), DayUsage(101, CHAT, ONE)]


async def test_a_clock_that_is_set_back_over_midnight_loses_nothing(
    stores: Stores, clock: FakeClock
) -> None:
    clock.now_s = 101.0 * DAY_S - 1
    ledger = UsageLedger(stores.usage, "w")
    for step_s in (2, -2, 2):
        ledger.add(CHAT, ONE)
        await ledger.save()
        clock.advance(step_s)
    ledger.add(CHAT, ONE)
    await ledger.save()
    two = ONE + ONE
    assert await days(stores, "key") == [DayUsage(100, CHAT, two), DayUsage(101, CHAT, two)]


async def test_many_writers_at_once_lose_nothing_and_wait_for_no_row(stores: Stores) -> None:
    """Servers on one store, and lines of the same owner beside them."""
    ledgers = [UsageLedger(stores.usage, f"w{n}") for n in range(4)]

    async def serve(ledger: UsageLedger) -> None:
        for _ in range(5):
            ledger.add(CHAT, ONE)
            await ledger.save()

    await asyncio.gather(*map(serve, ledgers))
    assert await total(stores) == sum([ONE] * 20, Counts())
    assert await num_rows(stores) == 4


async def test_passed_days_are_added_up_and_old_ones_forgotten(
    stores: Stores, clock: FakeClock
) -> None:
    clock.now_s = 100.0 * DAY_S
    for day in range(6):
        for writer in ("a", "b"):
            ledger = UsageLedger(stores.usage, f"{writer}{day}")
            ledger.add(CHAT, ONE)
            await ledger.save()
        clock.advance(DAY_S)
    clock.advance(-DAY_S)
    await asyncio.gather(*(stores.usage.tidy(5) for _ in range(3)))
    two = ONE + ONE
    assert await days(stores, "key") == [DayUsage(day, CHAT, two) for day in range(101, 106)]
    assert await num_rows(stores) == 3 + 2 * 2  # the last two days are still written to
    await stores.usage.tidy(5)
    assert await days(stores, "key") == [DayUsage(day, CHAT, two) for day in range(101, 106)]


async def test_where_nothing_is_to_be_added_up_a_year_is_not_read(
    stores: Stores, clock: FakeClock
) -> None:
    """Each worker looks once a minute."""
    clock.now_s = 500.0 * DAY_S
    ledger = UsageLedger(stores.usage, "w")
    ledger.add(CHAT, ONE)
    await ledger.save()
    row = {"tenant": "key", "request_class": "flex", "model": "m", "writer": "", **asdict(ONE)}
    async with stores.database.write() as connection:
        rows = [{"day": 500 - 350 + at // 9, **row, "model": f"m{at}"} for at in range(3000)]
        await connection.execute(insert(day_usage), rows)
    with heard(stores) as said:
        await stores.usage.tidy(400)
    looks = [each for each in said if each[0].startswith(("SELECT", "DELETE"))]
    assert [each[0][:6] for each in looks] == ["SELECT"]
    if stores.database.is_sqlite:  # PostgreSQL's choice is that of its statistics
        plan_text = await plan(stores, *looks[0])
        assert "ix_day_usage_writers" in plan_text
        assert "day_usage" not in scans(plan_text)


async def test_what_servers_from_before_count_is_taken_over(stores: Stores) -> None:
    old = {"tenant": TENANT, "day": stores.usage.today, "completed": 2, "failed": 1}
    tokens = {"input_tokens": 5, "cached_tokens": 1, "output_tokens": 7, "reasoning_tokens": 0}
    for _ in range(2):
        async with stores.database.write() as connection:
            await connection.execute(insert(usage).values(**old, **tokens))
        await stores.usage.tidy(400)
    (found,) = await days(stores)
    assert found.billed == (TENANT, "batch", "")
    assert found.counts == Counts(4, 2, 10, 2, 14, 0)


async def test_a_key_sees_its_own(settings: BatchSettings) -> None:
    model = FakeModel(api_keys=["mine", "theirs"])
    async with running(settings, model) as run:
        content = jsonl([line("a"), line("b"), line("bad", "fail:400:9:x")])
        await run.until((await run.submit(content)).id, "completed")
        found = (await run.http.get("/v1/usage")).json()["data"]
        assert {(day["request_class"], day["model"]) for day in found} == {("batch", MODEL)}
        used = [day["usage"] for day in found]  # of two days where midnight comes between
        assert sum(day["completed"] for day in found) == 2
        assert sum(day["failed"] for day in found) == 1
        assert sum(one["input_tokens"] for one in used) == 6
        assert sum(one["output_tokens"] for one in used) == 4
        assert sum(one["input_tokens_details"]["cached_tokens"] for one in used) == 2
        none: Any = {"object": "list", "data": []}
        other = {"authorization": "Bearer theirs"}
        assert (await run.http.get("/v1/usage?days=1", headers=other)).json() == none
        assert (await run.http.get("/v1/usage?request_class=online")).json() == none
        for wrong in ("days=0", "request_class=slow"):
            refused = await run.http.get(f"/v1/usage?{wrong}")
            param = wrong.partition("=")[0]
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_the_operator_sees_all_keys(tmp_path: Path, clock: FakeClock) -> None:
    settings = BatchSettings(data_dir=tmp_path)
    made = Stores(settings, time.time)
    await made.prepare()
    ledger = UsageLedger(made.usage, "w")
    ledger.add(CHAT, ONE)
    ledger.add(Billed("another", "flex", "m"), MANY)
    await ledger.save()
    await made.close()
    place = ("--data-dir", str(tmp_path))
    told = await asyncio.to_thread(CliRunner().invoke, app, ["usage", *place, "--json"])
    assert {day["owner"]: day["completed"] for day in json.loads(told.output)} == {
        "key": 1,
        "another": 1000,
    }
    shown = await asyncio.to_thread(CliRunner().invoke, app, ["usage", *place, "--class", "flex"])
    assert "another" in shown.output
    assert "10,000" in shown.output
    assert "key" not in shown.output
