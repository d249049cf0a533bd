"""Jobs, lines, the batches of a key and every number from outside have bounds."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from msgspec import structs

from conserve.batch import worker
from conserve.batch.deadlines import RecentHarvest
from conserve.batch.describe import batch_object
from conserve.batch.errors import OverLimitError, StoreUnavailableError
from conserve.batch.executor import Reply
from conserve.batch.ids import tenant_of
from conserve.batch.intake import Intake
from conserve.batch.job_store import JobStore
from conserve.batch.lease_store import LeaseStore
from conserve.batch.lifecycle import Status
from conserve.batch.outcome import MAX_TOKENS, keep_reply
from conserve.batch.outlook import Outlook
from conserve.batch.records import BatchRecord, Line
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.wire import BatchCreate
from tests.batch.batch_fakes import FakeClock, FakeModel, Running, eventually, running
from tests.batch.builders import (
    TENANT,
    batch_body,
    jsonl,
    line,
    numbered,
    stored_batch,
    stored_file,
)

pytestmark = pytest.mark.anyio

MAX_LIVE = 3


@pytest.fixture
def store_limits() -> dict[str, Any]:
    return {"max_live_batches": MAX_LIVE}


async def fail(*_: Any) -> None:
    raise OverflowError("value out of int64 range")


class OfUnknownLength(FakeModel):
    """As an adapter is described: without a length."""

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.name, "object": "model"}]}


async def test_absurd_numbers_in_a_file_of_a_model_without_a_length(
    settings: BatchSettings,
) -> None:
    absurd = {"max_tokens": 10**20, "n": 10**20, "seed": 10**40, "max_completion_tokens": 1e300}
    async with running(settings, OfUnknownLength()) as run:
        batch = await run.submit(jsonl([line("a", body=absurd), line("b")]))
        batch = await run.until(batch.id, "completed", "failed")
        assert (batch.status, batch.request_counts.completed) == ("completed", 2)


@pytest.mark.parametrize("job", ["validation", "assembly"])
async def test_a_job_that_always_fails_ends_its_batch(
    tmp_path: Path, database_url: str, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = BatchSettings(
        data_dir=tmp_path, database_url=database_url, poll_s=0.05, max_attempts=1
    )
    place, name = (Intake, "run") if job == "validation" else (JobStore, "settle")
    monkeypatch.setattr(place, name, fail)
    async with running(settings) as run:
        batch = await run.until((await run.submit(numbered(3))).id, "failed")
        (reason,) = batch.errors.data
        assert reason.code == "server_error"
        assert "value out of int64 range" in reason.message
        assert batch.failed_at is not None


async def try_once(run: Running, worker_id: str) -> BatchRecord:
    """One try at the only job, by a worker of the test's own."""
    job = await run.service.stores.jobs.claim(worker_id)
    assert job is not None
    await run.service._worker._job(job)
    (batch,), _ = await run.service.stores.batches.page("everybody", None, 1)
    return batch


async def test_tries_are_counted_and_wait_longer_each_time(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = BatchSettings(data_dir=tmp_path, tenant_by_key=False, max_attempts=3)
    async with running(settings, clock=clock) as run:
        await run.service.stores.prepare()
        await run.service.stop()
        await run.service.stores.workers.enlist("w")
        await run.submit(numbered(3))
        monkeypatch.setattr(Intake, "run", fail)
        for tries, delay_s in ((1, 5), (2, 10)):
            batch = await try_once(run, "w")
            assert (batch.status, batch.attempts) == (Status.VALIDATING, tries)
            assert batch.not_before == clock() + delay_s
            assert await run.service.stores.jobs.claim("w") is None
            clock.advance(delay_s)
        batch = await try_once(run, "w")
        assert batch.status is Status.FAILED


async def test_a_storage_that_is_away_counts_against_no_batch(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> None:
        raise StoreUnavailableError("away")

    settings = BatchSettings(data_dir=tmp_path, tenant_by_key=False, max_attempts=1)
    async with running(settings, clock=clock) as run:
        await run.service.stores.prepare()
        await run.service.stop()
        await run.service.stores.workers.enlist("w")
        await run.submit(numbered(3))
        with monkeypatch.context() as patch:
            patch.setattr(Intake, "run", away)
            for _ in range(3):
                batch = await try_once(run, "w")
                assert (batch.status, batch.attempts) == (Status.VALIDATING, 0)
                clock.advance(60)
        assert (await try_once(run, "w")).status is Status.IN_PROGRESS


async def test_a_folder_that_is_missing_costs_no_result(tmp_path: Path, clock: FakeClock) -> None:
    """As where its disk is not mounted."""
    settings = BatchSettings(data_dir=tmp_path, tenant_by_key=False, max_attempts=1)
    async with running(settings, clock=clock) as run:
        stores, model = run.service.stores, run.model
        model.open.clear()
        batch_id = (await run.submit(numbered(3))).id
        await eventually(lambda: model.running == 3)
        folders = {tmp_path / name: tmp_path / f"away-{name}" for name in ("staging", "files")}
        for folder, away in folders.items():
            folder.rename(away)
        model.open.set()
        await run.until(batch_id, "finalizing")
        await run.service.stop()
        await stores.workers.enlist("w")
        for folder, away in folders.items():
            clock.advance(60)
            batch = await try_once(run, "w")
            assert (batch.status, batch.attempts) == (Status.FINALIZING, 0)
            away.rename(folder)
        clock.advance(60)
        batch = await try_once(run, "w")
        assert (batch.status, batch.completed) == (Status.COMPLETED, 3)


async def test_a_folder_that_goes_cuts_off_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Clearing away fails then, again and again, and what is in flight goes on beside it."""
    monkeypatch.setattr(worker, "COLLECT_EVERY_S", 0.05)
    monkeypatch.setattr(worker, "JOB_RETRY_S", 0.05)
    async with running(BatchSettings(data_dir=tmp_path, poll_s=0.05)) as run:
        run.model.open.clear()
        batch_id = (await run.submit(numbered(3))).id
        await eventually(lambda: run.model.running == 3)
        (tmp_path / "staging").rename(tmp_path / "away")
        await eventually(lambda: "a part of the batch service waits" in caplog.text)
        run.model.open.set()
        await run.until(batch_id, "finalizing")
        (tmp_path / "away").rename(tmp_path / "staging")
        assert (await run.until(batch_id, "completed")).request_counts.completed == 3
        assert set(run.model.seen.values()) == {1}
        assert "starts over" not in caplog.text


async def test_what_keeps_the_service_from_starting_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "RESTART_S", 0.01)
    prepare, tries = Stores.prepare, 0

    async def denied(self: Stores) -> None:
        nonlocal tries
        tries += 1
        if tries <= 5:
            raise RuntimeError("permission denied for schema public")
        await prepare(self)

    monkeypatch.setattr(Stores, "prepare", denied)
    async with running(BatchSettings(data_dir=tmp_path, poll_s=0.05)) as run:
        await eventually(lambda: tries > 5)
        await run.until((await run.submit(numbered(3))).id, "completed")
    told = [record for record in caplog.records if "batch service" in record.getMessage()]
    assert [record.getMessage() for record in told] == ["the batch service waits"]
    assert "permission denied for schema public" in str(told[0].exc_info)


async def test_in_a_folder_that_is_missing_no_file_is_gone(stores: Stores, tmp_path: Path) -> None:
    file_id = (await stored_file(stores, numbered(1))).id
    contents = stores.contents
    (tmp_path / "files").rename(tmp_path / "away")
    with pytest.raises(StoreUnavailableError):
        await contents.ranges(file_id, [(0, 1)])
    with pytest.raises(StoreUnavailableError):
        await anext(contents.chunks(file_id))
    with pytest.raises(StoreUnavailableError):
        await contents.delete(file_id)
    (tmp_path / "away").rename(tmp_path / "files")
    assert len(await contents.ranges(file_id, [(0, 1)])) == 1
    await contents.delete(file_id)
    await contents.delete(file_id)  # is gone already
    with pytest.raises(FileNotFoundError):
        await contents.ranges(file_id, [(0, 1)])


async def test_a_job_that_ends_its_process_ends_its_batch(tmp_path: Path, clock: FakeClock) -> None:
    settings = BatchSettings(data_dir=tmp_path, tenant_by_key=False, max_losses=2)
    async with running(settings, clock=clock) as run:
        stores = run.service.stores
        await stores.prepare()
        await run.service.stop()
        await run.submit(numbered(3))
        for _ in range(settings.max_losses + 1):
            await stores.workers.enlist("dies")
            assert await stores.jobs.claim("dies") is not None
            await stores.workers.bury("dies", only_overdue=False)
        await stores.workers.enlist("w")
        batch = await try_once(run, "w")
        assert (batch.status, batch.losses) == (Status.FAILED, settings.max_losses + 1)


async def test_the_rate_of_a_batch_that_has_failed_stays(stores: Stores, clock: FakeClock) -> None:
    batch = await stored_batch(stores, await stored_file(stores, numbered(1)))
    ended = structs.replace(
        batch, status=Status.FAILED, in_progress_at=clock(), failed_at=clock() + 10, input_tokens=50
    )
    clock.advance(10)
    for _ in range(2):
        shown = batch_object(ended, Outlook(clock(), RecentHarvest(), {}))
        assert shown.tokens_per_second == 5.0
        clock.advance(3600)


async def test_what_was_retired_politely_is_no_loss(stores: Stores) -> None:
    batch = await stored_batch(stores, await stored_file(stores, numbered(1)))
    await stores.workers.enlist("polite")
    await stores.jobs.claim("polite")
    await stores.workers.retire("polite")
    assert (await stores.batches.get(TENANT, batch.id)).losses == 0


async def test_late_batches_end_where_no_server_has_their_model(
    tmp_path: Path, database_url: str, clock: FakeClock
) -> None:
    """One whose lines were running when its server went, and one that was never validated."""
    settings = BatchSettings(data_dir=tmp_path, database_url=database_url, poll_s=0.05)
    away = FakeModel()
    away.open.clear()
    async with running(settings, away, clock) as run:
        begun = await run.submit(numbered(3), deadline="60s")
        await eventually(lambda: away.running == 3)
        file_id = begun.input_file_id
    async with running(settings, FakeModel(name="other"), clock) as run:
        stores = run.service.stores
        request = BatchCreate(**batch_body(file_id, deadline="60s"))
        waiting = await stores.batches.create(tenant_of("Bearer any"), request, None, 1, "fake")
        clock.advance(61)
        begun = await run.until(begun.id, "expired")
        assert len(await run.lines_of(begun.error_file_id)) == 3
        batch = await run.until(waiting.id, "expired")
        assert batch.expired_at == int(clock())
        assert (batch.request_counts.total, batch.error_file_id) == (0, None)


async def test_a_result_that_cannot_be_stored_fails_its_line_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = LeaseStore._record

    async def choke(
        self: LeaseStore, connection: Any, worker_id: Any, batch_id: str, part: list[Any]
    ) -> Any:
        if any(getattr(each, "payload", b"").find(b"nosiop") >= 0 for each in part):
            raise OverflowError("out of range")
        return await record(self, connection, worker_id, batch_id, part)

    monkeypatch.setattr(LeaseStore, "_record", choke)
    settings = BatchSettings(data_dir=tmp_path, poll_s=0.05, max_attempts=1)
    async with running(settings) as run:
        content = jsonl([line("a"), line("bad", "poison"), line("b")])
        batch = await run.until((await run.submit(content)).id, "completed")
        assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
        (row,) = (await run.lines_of(batch.error_file_id)).values()
        assert (row["custom_id"], row["error"]["code"]) == ("bad", "server_error")


def test_usage_beyond_belief_is_bounded() -> None:
    usage = {"prompt_tokens": 10**25, "completion_tokens": -5}
    tokens = keep_reply(
        Line("batch_x", 1, "a", 0, 0, 0), Reply(200, json.dumps({"usage": usage}).encode())
    ).tokens
    assert (tokens.input, tokens.output) == (MAX_TOKENS, 0)


async def test_a_key_has_so_many_live_batches(tmp_path: Path) -> None:
    settings = BatchSettings(data_dir=tmp_path, poll_s=0.05, max_live_batches=2)
    model = FakeModel(api_keys=["mine", "theirs"])
    model.open.clear()
    async with running(settings, model) as run:
        first = await run.submit(numbered(2))
        await run.submit(numbered(2))
        file_id = await run.upload(numbered(2))
        with pytest.raises(openai.RateLimitError, match="2 batches of this key") as caught:
            await run.client.batches.create(**batch_body(file_id))
        assert "--max-live-batches" in caught.value.message
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "rate_limit_error")
        assert int(caught.value.response.headers["retry-after"]) > 0
        other = run.client_of("theirs")
        theirs = await other.files.create(file=("in.jsonl", numbered(1)), purpose="batch")
        await other.batches.create(**batch_body(theirs.id))
        await run.client.batches.cancel(first.id)
        await run.until(first.id, "cancelled")
        await run.client.batches.create(**batch_body(file_id))
        model.open.set()


async def test_the_limit_holds_however_many_ask_at_once(stores: Stores) -> None:
    file = await stored_file(stores, numbered(1))
    found = await asyncio.gather(
        *(stored_batch(stores, file) for _ in range(MAX_LIVE + 4)), return_exceptions=True
    )
    refused = [one for one in found if isinstance(one, OverLimitError)]
    assert len(found) - len(refused) == MAX_LIVE
    assert all(isinstance(one, BatchRecord | OverLimitError) for one in found)


async def test_a_key_once_used_is_answered_at_the_limit(stores: Stores) -> None:
    file = await stored_file(stores, numbered(1))
    made = [await stored_batch(stores, file, f"key-{n}") for n in range(MAX_LIVE)]
    assert (await stored_batch(stores, file, "key-0")).id == made[0].id


@pytest.mark.parametrize("name", ["max_lines", "max_line_bytes", "max_file_bytes"])
def test_settings_fit_the_database(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        BatchSettings.model_validate({name: 2**63})
