"""What the store promises, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from msgspec.structs import replace

from conserve.batch import file_store, job_store
from conserve.batch.assembly import Assembly
from conserve.batch.deadlines import RecentHarvest
from conserve.batch.errors import InvalidRequestError, LeaseLostError, NotFoundError
from conserve.batch.executor import Reply
from conserve.batch.harvest_meter import HarvestMeter
from conserve.batch.lifecycle import Status
from conserve.batch.outcome import Postponed, Result, Tokens, keep_reply
from conserve.batch.records import BatchRecord, FileRecord, Line
from conserve.batch.rules import Rules
from conserve.batch.schema import batches, files, metadata
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.validation import Validation
from conserve.batch.wire import LineErrorObject
from tests.batch.batch_fakes import FakeClock
from tests.batch.builders import CHAT, TENANT, numbered, stored_batch, stored_file
from tests.batch.test_batch_many import heard

pytestmark = pytest.mark.anyio

LEASE_S = 30.0
OK = Reply(200, b'{"usage":{"prompt_tokens":3,"completion_tokens":2}}')
MANY, BYTES = 1000, 1_000_000


@pytest.fixture
def store_limits() -> dict[str, Any]:
    return {"lease_s": LEASE_S}


async def batch_in_progress(
    stores: Stores, num_lines: int = 3, *, tenant: str = TENANT, **wishes: Any
) -> str:
    """Its id."""
    file = await stored_file(stores, numbered(num_lines), tenant)
    batch = await stored_batch(stores, file, **wishes)
    worker = f"intake-{batch.id}"
    await stores.workers.enlist(worker)
    job = await stores.jobs.claim(worker)
    assert job is not None
    await stores.jobs.clear_lines(job)
    validation = Validation(Rules(CHAT))
    found = [*validation.feed(numbered(num_lines)), *validation.finish()]
    await stores.jobs.add_lines(job, found)
    await stores.jobs.accept(job, validation)
    await stores.workers.retire(worker)
    return batch.id


async def claim(stores: Stores, worker: str, batch_id: str, limit: int = MANY) -> list[Line]:
    return await stores.leases.claim(worker, batch_id, limit, BYTES, MANY)


def done(lines: list[Line]) -> list[Result]:
    return [keep_reply(line, OK) for line in lines]


async def counts(stores: Stores, batch_id: str) -> tuple[int, int, int]:
    batch = await stores.batches.get(TENANT, batch_id)
    return batch.total, batch.completed, batch.failed


async def test_migrations_make_the_tables_the_code_expects(stores: Stores) -> None:
    def differences(connection: Any) -> list[Any]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async with stores.database.read() as connection:
        assert await connection.run_sync(differences) == []


async def test_a_record_is_its_row(stores: Stores, clock: FakeClock) -> None:
    for record, table in ((FileRecord, files), (BatchRecord, batches)):
        assert set(record.__struct_fields__) == set(table.columns.keys())
    file = await stored_file(stores, numbered(1))
    assert await stores.files.get(TENANT, file.id) == file
    made = await stored_batch(stores, file, metadata={"é": "1"}, deadline="1h", priority=3)
    due = clock() + 3600
    assert (made.metadata, made.priority, made.deadline_at) == ({"é": "1"}, 3, due)
    assert (made.created_at, made.expires_at, made.status) == (clock(), due, Status.VALIDATING)
    await stores.workers.enlist("w")
    job = await stores.jobs.claim("w")
    assert job == replace(made, owner="w")
    reason = LineErrorObject(code="c", message="m", line=2)
    await stores.jobs.refuse(job, [reason])
    found = await stores.batches.get(TENANT, made.id)
    assert found == replace(made, status=Status.FAILED, failed_at=clock(), errors=(reason,))


async def test_many_servers_migrate_at_once(tmp_path: Path, database_url: str) -> None:
    settings = BatchSettings(data_dir=tmp_path, database_url=database_url)
    many = [Stores(settings, FakeClock()) for _ in range(4)]
    await asyncio.gather(*(one.prepare() for one in many))
    await many[0].workers.enlist("w")
    assert await many[3].workers.others("x") == ["w"]
    for one in many:
        await one.close()


async def test_a_line_is_leased_to_one_worker(stores: Stores) -> None:
    batch_id = await batch_in_progress(stores, 40)
    workers = [f"w{n}" for n in range(8)]
    for worker in workers:
        await stores.workers.enlist(worker)
    claims = await asyncio.gather(*(claim(stores, worker, batch_id, 7) for worker in workers))
    taken = [line.line_no for lines in claims for line in lines]
    assert len(taken) == len(set(taken))
    rest = await claim(stores, "w0", batch_id)
    assert sorted(taken + [line.line_no for line in rest]) == list(range(1, 41))
    assert await claim(stores, "w1", batch_id) == []


async def test_a_result_is_stored_once_and_counted_once(stores: Stores) -> None:
    batch_id = await batch_in_progress(stores)
    await stores.workers.enlist("w")
    lines = await claim(stores, "w", batch_id)
    failed = Result(lines[0], True, b"{}", Tokens(input=1))
    assert len(await stores.leases.record("w", [failed, *done(lines[1:])])) == 3
    assert await stores.leases.record("w", done(lines)) == []
    assert await counts(stores, batch_id) == (3, 2, 1)
    batch = await stores.batches.get(TENANT, batch_id)
    assert (batch.input_tokens, batch.output_tokens) == (7, 4)


async def test_the_dead_bring_nothing_and_their_lines_run_again(
    stores: Stores, clock: FakeClock
) -> None:
    batch_id = await batch_in_progress(stores)
    await stores.workers.enlist("dead")
    await stores.workers.enlist("alive")
    lines = await claim(stores, "dead", batch_id)
    clock.advance(LEASE_S - 1)
    await stores.workers.heartbeat("alive")
    assert await stores.workers.overdue() == []
    assert not await stores.workers.bury("dead", only_overdue=True)
    clock.advance(2)
    assert await stores.workers.overdue() == ["dead"]
    assert await stores.workers.bury("dead", only_overdue=True)
    assert not await stores.workers.bury("dead", only_overdue=True)
    again = await claim(stores, "alive", batch_id)
    assert [line.line_no for line in again] == [line.line_no for line in lines]
    assert await stores.leases.record("dead", done(lines)) == []
    for call in (stores.workers.heartbeat("dead"), claim(stores, "dead", batch_id)):
        with pytest.raises(LeaseLostError):
            await call
    assert len(await stores.leases.record("alive", done(again))) == 3
    assert await counts(stores, batch_id) == (3, 3, 0)


async def test_a_retired_worker_costs_its_lines_nothing(stores: Stores) -> None:
    batch_id = await batch_in_progress(stores)
    for name in ("polite", "lost"):
        await stores.workers.enlist(name)
        await claim(stores, name, batch_id)
        if name == "polite":
            await stores.workers.retire(name)
    assert await stores.leases.worn_out(0) == []
    await stores.workers.bury("lost", only_overdue=False)
    assert len(await stores.leases.worn_out(0)) == 3
    await stores.workers.enlist("w")
    assert await stores.leases.claim("w", batch_id, 9, BYTES, max_losses=0) == []
    assert await stores.leases.waiting(0) == set()
    assert await stores.leases.waiting(1) == {batch_id}
    # Lines that nobody may run any more are failed without a worker.
    worn = await stores.leases.worn_out(0)
    assert len(await stores.leases.record(None, done(worn))) == 3


async def test_a_postponed_line_waits_and_remembers(stores: Stores, clock: FakeClock) -> None:
    batch_id = await batch_in_progress(stores, 1)
    await stores.workers.enlist("w")
    (line,) = await claim(stores, "w", batch_id)
    await stores.leases.record("w", [Postponed(line, clock() + 5, counted=True)])
    assert await claim(stores, "w", batch_id) == []
    assert await stores.leases.waiting(MANY) == set()
    clock.advance(5)
    (line,) = await claim(stores, "w", batch_id)
    assert line.attempts == 1
    await stores.leases.record("w", [Postponed(line, 0, counted=False)])
    (line,) = await claim(stores, "w", batch_id)
    assert line.attempts == 1


async def test_strays_of_a_lost_answer_go_back(stores: Stores) -> None:
    batch_id = await batch_in_progress(stores)
    await stores.workers.enlist("w")
    kept, *strays = await claim(stores, "w", batch_id)
    await stores.leases.give_back_others("w", [kept])
    assert await claim(stores, "w", batch_id) == strays


async def test_a_cancelled_batch_leases_nothing_but_takes_results(stores: Stores) -> None:
    batch_id = await batch_in_progress(stores)
    await stores.workers.enlist("w")
    lines = await claim(stores, "w", batch_id, 2)
    assert await stores.leases.closed([batch_id]) == set()
    await stores.batches.cancel(TENANT, batch_id)
    assert await stores.leases.closed([batch_id]) == {batch_id}
    assert await claim(stores, "w", batch_id) == []
    assert await stores.jobs.claim("w") is None  # lines are still out
    await stores.leases.record("w", done(lines))
    job = await stores.jobs.claim("w")
    assert job is not None
    assert job.status is Status.CANCELLING
    again = await stores.batches.cancel(TENANT, batch_id)  # the first answer may have been lost
    assert (again.status, again.owner) == (Status.CANCELLING, "w")
    await stores.jobs.settle(job, Status.CANCELLED, {})
    with pytest.raises(InvalidRequestError):
        await stores.batches.cancel(TENANT, batch_id)


async def test_a_late_batch_leases_nothing(stores: Stores, clock: FakeClock) -> None:
    batch_id = await batch_in_progress(stores, completion_window="60s")
    await stores.workers.enlist("w")
    clock.advance(60)
    assert await claim(stores, "w", batch_id) == []
    assert await stores.jobs.claim("w") is None
    await stores.jobs.expire()
    job = await stores.jobs.claim("w")
    assert job is not None
    assert job.expiring


async def test_what_was_put_off_is_due_where_the_clock_is_set_back(
    stores: Stores, clock: FakeClock
) -> None:
    batch_id = await batch_in_progress(stores, 1)
    await stores.workers.enlist("w")
    (held,) = await claim(stores, "w", batch_id)
    await stores.leases.record("w", [Postponed(held, clock() + 60, counted=False)])
    assert await claim(stores, "w", batch_id) == []
    clock.advance(-12 * 3600)
    assert await stores.leases.waiting(MANY) == {batch_id}
    assert await claim(stores, "w", batch_id) == [held]


async def test_a_job_that_was_put_off_is_due_where_the_clock_is_set_back(
    stores: Stores, clock: FakeClock
) -> None:
    await stored_batch(stores, await stored_file(stores, numbered(1)))
    await stores.workers.enlist("w")
    job = await stores.jobs.claim("w")
    assert job is not None
    await stores.jobs.postpone(job, 300, counted=False)
    assert await stores.jobs.claim("w") is None
    clock.advance(-12 * 3600)
    assert await stores.jobs.claim("w") is not None


async def test_a_batch_whose_lines_ended_in_time_does_not_expire(
    stores: Stores, clock: FakeClock
) -> None:
    """Its files are all that is left to write when its time is over."""
    batch_id = await batch_in_progress(stores, 2, completion_window="60s")
    await stores.workers.enlist("w")
    await stores.leases.record("w", done(await claim(stores, "w", batch_id)))
    clock.advance(60)
    await stores.jobs.expire()
    job = await stores.jobs.claim("w")
    assert job is not None
    await Assembly(stores.jobs, stores.files).run(job)
    batch = await stores.batches.get(TENANT, batch_id)
    assert (batch.status, batch.completed) == (Status.COMPLETED, 2)


async def test_a_job_belongs_to_one_worker_and_is_taken_over(
    stores: Stores, clock: FakeClock
) -> None:
    batch_id = await batch_in_progress(stores, 1)
    for name in ("first", "second"):
        await stores.workers.enlist(name)
    await stores.leases.record("first", done(await claim(stores, "first", batch_id)))
    job = await stores.jobs.claim("first")
    assert job is not None
    assert await stores.jobs.claim("second") is None
    await stores.workers.bury("first", only_overdue=False)
    other = await stores.jobs.claim("second")
    assert other is not None
    assembly = Assembly(stores.jobs, stores.files)
    with pytest.raises(LeaseLostError):
        await assembly.run(job)
    await assembly.run(other)
    batch = await stores.batches.get(TENANT, batch_id)
    assert batch.status is Status.COMPLETED
    assert batch.output_file_id is not None
    assert (await stores.files.get(TENANT, batch.output_file_id)).purpose == "batch_output"


async def test_cancelled_while_it_is_assembled(stores: Stores, clock: FakeClock) -> None:
    batch_id = await batch_in_progress(stores, 1)
    await stores.workers.enlist("w")
    await stores.leases.record("w", done(await claim(stores, "w", batch_id)))
    job = await stores.jobs.claim("w")
    assert job is not None
    job = await stores.jobs.finalize(job)
    await stores.batches.cancel(TENANT, batch_id)
    assembly = Assembly(stores.jobs, stores.files)
    with pytest.raises(LeaseLostError):
        await assembly.run(job)
    again = await stores.jobs.claim("w")
    assert again is not None
    await assembly.run(again)
    batch = await stores.batches.get(TENANT, batch_id)
    assert (batch.status, batch.completed) == (Status.CANCELLED, 1)
    assert batch.output_file_id is not None


async def test_a_postponed_job_comes_back(stores: Stores, clock: FakeClock) -> None:
    batch_id = await batch_in_progress(stores, 1)
    await stores.workers.enlist("w")
    await stores.leases.record("w", done(await claim(stores, "w", batch_id)))
    job = await stores.jobs.claim("w")
    assert job is not None
    await stores.jobs.postpone(job, 5, counted=True)
    assert await stores.jobs.claim("w") is None
    clock.advance(5)
    again = await stores.jobs.claim("w")
    assert again is not None
    assert again.id == batch_id


async def test_lines_of_ended_batches_are_cleared(stores: Stores, clock: FakeClock) -> None:
    batch_id = await batch_in_progress(stores, 3)
    await stores.workers.enlist("w")
    await stores.leases.record("w", done(await claim(stores, "w", batch_id)))
    assert not await stores.ended.clear_lines()
    job = await stores.jobs.claim("w")
    assert job is not None
    await Assembly(stores.jobs, stores.files).run(job)
    while await stores.ended.clear_lines():
        pass
    assert [ends async for ends in stores.jobs.outcomes(batch_id)] == []
    assert await counts(stores, batch_id) == (3, 3, 0)


@pytest.mark.parametrize("num_bytes", [0, 25, 10**6])
async def test_results_are_read_in_order_and_no_more_than_fit(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    """Whatever one of them has: vectors and logprobs may have many megabytes."""
    monkeypatch.setattr(job_store, "ASSEMBLY_BYTES", num_bytes)
    monkeypatch.setattr(job_store, "ASSEMBLY_ROWS", 4)
    batch_id = await batch_in_progress(stores, 9)
    await stores.workers.enlist("w")
    held = await claim(stores, "w", batch_id, 9)
    sizes = {1: 10, 2: 10, 3: 10, 4: 100, 5: 5, 7: 20, 8: 5}
    mine = [
        Result(line, False, b"x" * sizes[line.line_no]) for line in held if line.line_no in sizes
    ]
    await stores.leases.record("w", mine)
    pages = [ends async for ends in stores.jobs.outcomes(batch_id)]
    found = {end.line_no: len(end.payload or b"") for ends in pages for end in ends}
    assert found == dict.fromkeys(range(1, 10), 0) | sizes
    assert list(found) == list(range(1, 10))
    for ends in pages:
        assert len(ends) == 1 or sum(len(end.payload or b"") for end in ends) <= num_bytes
    by_bytes = {0: 9, 25: 5, 10**6: 3}
    assert len(pages) == by_bytes[num_bytes]


async def test_one_key_makes_one_batch_however_many_send_it(stores: Stores) -> None:
    file = await stored_file(stores, numbered(1))
    made = await asyncio.gather(*(stored_batch(stores, file, "key") for _ in range(6)))
    assert len({batch.id for batch in made}) == 1
    other = await stored_file(stores, numbered(1), tenant="u")
    assert (await stored_batch(stores, other, "key")).id != made[0].id


@pytest.mark.parametrize("limit", [0, 3, 4, 10_000])
async def test_a_page_is_read_a_few_rows_at_a_time(
    stores: Stores, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Ten thousand at once would hold up the loop that answers chats."""
    monkeypatch.setattr(file_store, "ROWS_AT_ONCE", 2)
    ids = []
    for _ in range(5):
        ids.append((await stored_file(stores, numbered(1))).id)
        clock.advance(1)
    with heard(stores) as statements:
        found, more = await stores.files.page(TENANT, None, limit, "asc", "batch")
    assert ([file.id for file in found], more) == (ids[:limit], limit < 5)
    looks = [statement for statement, _ in statements if statement.startswith("SELECT")]
    assert len(looks) == min(limit + 2, 7) // 2
    newest, more = await stores.files.page(TENANT, ids[4], limit, "desc", None)
    assert ([file.id for file in newest], more) == (ids[3::-1][:limit], limit < 4)


async def test_files_and_blobs_stay_in_step(stores: Stores, clock: FakeClock) -> None:
    kept = (await stored_file(stores, numbered(1))).id
    gone = (await stored_file(stores, numbered(2))).id
    await stores.files.delete(TENANT, gone)
    with pytest.raises(NotFoundError):
        await stores.files.delete(TENANT, gone)
    assert os.listdir(stores.contents._root) == [kept]
    assert await stores.files.collect() == 0
    with pytest.raises(NotFoundError):
        await stores.files.get("u", kept)


async def test_the_harvest_is_a_rate_while_busy(stores: Stores, clock: FakeClock) -> None:
    assert (await stores.harvest.recent()).tokens_per_s is None
    await stores.workers.enlist("w")
    await stores.harvest.add("w", 4, Tokens(input=60, output=40), 10.0)
    clock.advance(1800)
    await stores.harvest.add("w", 4, Tokens(input=60, output=40), 10.0)
    recent = await stores.harvest.recent()
    assert (recent.tokens_per_s, recent.mean_output_tokens) == (10.0, 10.0)
    await stores.workers.enlist("second")
    recent = await stores.harvest.recent()
    assert (recent.tokens_per_s, recent.num_workers) == (20.0, 2)
    clock.advance(3 * 3600)
    assert (await stores.harvest.recent()).tokens_per_s is None


async def test_a_meter_tells_the_harvest_once_a_second(stores: Stores, clock: FakeClock) -> None:
    batch_id = await batch_in_progress(stores)
    await stores.workers.enlist("w")
    first, second, third = done(await claim(stores, "w", batch_id))
    meter = HarvestMeter("w", stores.harvest, clock)
    await meter.count([first], is_busy=False)
    assert await stores.harvest.recent() == RecentHarvest()  # nothing was in flight
    meter.start()
    clock.advance(0.5)
    await meter.count([second], is_busy=True)
    assert (await stores.harvest.recent()).tokens_per_s is None
    clock.advance(0.5)
    await meter.count([third], is_busy=True)
    told = await stores.harvest.recent()
    assert (told.tokens_per_s, told.mean_output_tokens) == (15.0, 2.0)
    clock.advance(10)
    await meter.count([], is_busy=False)
    clock.advance(10)
    await meter.count([first], is_busy=False)  # it was idle meanwhile
    assert (await stores.harvest.recent()).tokens_per_s == pytest.approx(15 / 11)
