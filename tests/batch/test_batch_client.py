"""The official client, untouched, against the service over a fake model."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest

from conserve.batch import service
from conserve.batch.contents import Staging
from conserve.batch.describe import file_object
from conserve.batch.file_store import PLACE_KEPT_S
from conserve.batch.job_store import ASSEMBLY_ROWS
from conserve.batch.outcome import Tokens
from conserve.batch.records import FileRecord
from conserve.batch.settings import BatchSettings
from conserve.batch.wire import FileObject
from tests.batch.batch_fakes import POLL_S, FakeClock, FakeModel, answer, eventually, running
from tests.batch.builders import batch_body, jsonl, line, numbered

pytestmark = pytest.mark.anyio


async def test_a_batch_from_upload_to_output(settings: BatchSettings) -> None:
    async with running(settings) as run:
        file_id = await run.upload(numbered(50))
        body = batch_body(file_id, completion_window="1h", metadata={"purpose": "test"})
        batch = await run.client.batches.create(**body)
        assert batch.status in ("validating", "in_progress")
        assert batch.metadata == {"purpose": "test"}
        assert batch.expires_at == batch.created_at + 3600
        batch = await run.until(batch.id, "completed", "failed")
        assert (batch.status, batch.model, batch.error_file_id) == ("completed", "fake", None)
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (50, 50, 0)
        assert batch.usage.input_tokens == 150
        assert batch.usage.input_tokens_details.cached_tokens == 50
        assert batch.usage.output_tokens == 100
        assert batch.usage.total_tokens == 250
        assert batch.progress == 1.0
        assert batch.deadline_state == "met"
        lines = await run.lines_of(batch.output_file_id)
        assert {key: each["response"]["body"] for key, each in lines.items()} == {
            f"request-{n}": answer(f"prompt {n}") for n in range(50)
        }
        first = lines["request-0"]
        assert first["id"].startswith("batch_req_")
        assert first["error"] is None
        assert first["response"]["status_code"] == 200
        assert first["response"]["request_id"]


async def test_lines_run_as_offline_work_whatever_they_say(settings: BatchSettings) -> None:
    body = {"priority": -5, "service_tier": "priority", "temperature": 0.5, "stream": False}
    async with running(settings) as run:
        batch = await run.submit(jsonl([line("a", "x", body=body)]), priority=7)
        await run.until(batch.id, "completed")
        (sent,) = run.model.bodies
        assert (sent["priority"], sent["service_tier"]) == (8, "flex")
        assert sent["temperature"] == 0.5
        assert "stream" not in sent


async def test_failed_lines_go_to_the_error_file(settings: BatchSettings) -> None:
    content = jsonl([line("good", "hi"), line("bad", "fail:400:99")])
    async with running(settings) as run:
        batch = await run.until((await run.submit(content)).id, "completed")
        assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
        assert set(await run.lines_of(batch.output_file_id)) == {"good"}
        errors = await run.lines_of(batch.error_file_id)
        assert set(errors) == {"bad"}
        assert errors["bad"]["error"] is None
        assert errors["bad"]["response"]["status_code"] == 400
        assert errors["bad"]["response"]["body"]["error"]["message"] == "no"
        assert run.model.seen["fail:400:99"] == 1  # the client's own error is not tried again


async def test_the_servers_faults_are_tried_again(tmp_path: Path) -> None:
    clock = FakeClock()
    settings = BatchSettings(data_dir=tmp_path, poll_s=POLL_S, max_attempts=3)
    prompts = {"busy": "fail:503:6", "shaky": "fail:500:2", "broken": "fail:500:99"}
    content = jsonl([line(key, prompt) for key, prompt in prompts.items()])
    async with running(settings, clock=clock) as run:
        batch = await run.submit(content)
        while (await run.client.batches.retrieve(batch.id)).status != "completed":
            clock.advance(60)
            await asyncio.sleep(POLL_S)
        batch = await run.client.batches.retrieve(batch.id)
        assert set(await run.lines_of(batch.output_file_id)) == {"busy", "shaky"}
        errors = await run.lines_of(batch.error_file_id)
        assert errors["broken"]["response"]["status_code"] == 500
        assert run.model.seen == {"fail:503:6": 7, "fail:500:2": 3, "fail:500:99": 3}


async def test_files_are_listed_described_and_deleted(settings: BatchSettings) -> None:
    async with running(settings) as run:
        ids = [await run.upload(numbered(n)) for n in (1, 2, 3)]
        newest_first = [file.id async for file in run.client.files.list(limit=2)]
        assert newest_first == ids[::-1]
        oldest_first = [file.id async for file in run.client.files.list(order="asc", limit=1)]
        assert oldest_first == ids
        page = await run.client.files.list(after=ids[2], limit=1)
        assert [file.id for file in page.data] == [ids[1]]
        assert page.has_more
        assert [f async for f in run.client.files.list(purpose="batch_output")] == []
        file = await run.client.files.retrieve(ids[0])
        assert (file.filename, file.purpose, file.status) == ("input.jsonl", "batch", "processed")
        assert file.bytes == len(numbered(1))
        assert (await run.client.files.content(ids[0])).content == numbered(1)
        assert (await run.client.files.delete(ids[0])).deleted
        with pytest.raises(openai.NotFoundError):
            await run.client.files.retrieve(ids[0])
        kept = list((settings.data_dir / "files").iterdir())
        assert sorted(path.name for path in kept) == sorted(ids[1:])


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_files_may_be_deleted_and_added_while_they_are_listed(
    settings: BatchSettings, clock: FakeClock, order: Any
) -> None:
    """As whoever clears away does: the next page begins behind what is gone. Each is seen once."""
    async with running(settings, clock=clock) as run:
        ids = []
        for n in range(5):
            ids.append(await run.upload(numbered(n + 1)))
            clock.advance(1)
        seen = []
        async for file in run.client.files.list(limit=2, order=order):
            seen.append(file.id)
            await run.client.files.delete(file.id)
            if len(seen) == 1 and order == "desc":
                ids.append(await run.upload(numbered(9)))
        assert seen == (ids if order == "asc" else ids[4::-1])
        left = [file.id async for file in run.client.files.list()]
        assert left == ids[5:]
        stores = run.service.stores
        await stores.files.collect()
        page = await run.http.get("/v1/files", params={"after": seen[0], "order": order})
        assert page.status_code == 200
        clock.advance(PLACE_KEPT_S)
        assert await stores.files.collect() == 5
        page = await run.http.get("/v1/files", params={"after": seen[0], "order": order})
        assert page.status_code == 404


async def test_a_list_of_files_is_made_outside_the_loop(
    settings: BatchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which answers chats, however many files there are."""
    made_by = set[int]()

    def described(file: FileRecord) -> FileObject:
        made_by.add(threading.get_ident())
        return file_object(file)

    monkeypatch.setattr(service, "file_object", described)
    async with running(settings) as run:
        await run.upload(numbered(1))
        made_by.clear()
        assert len((await run.client.files.list()).data) == 1
    assert made_by
    assert threading.get_ident() not in made_by


async def test_batches_may_be_added_while_they_are_listed(
    settings: BatchSettings, clock: FakeClock
) -> None:
    async with running(settings, clock=clock) as run:
        ids = []
        for _ in range(5):
            ids.append((await run.submit(numbered(1))).id)
            clock.advance(1)
        seen = []
        async for batch in run.client.batches.list(limit=2):
            seen.append(batch.id)
            if len(seen) == 1:
                await run.submit(numbered(1))
        assert seen == ids[::-1]


async def test_batches_are_listed_newest_first(settings: BatchSettings) -> None:
    async with running(settings) as run:
        ids = [(await run.submit(numbered(1))).id for _ in range(5)]
        assert [batch.id async for batch in run.client.batches.list(limit=2)] == ids[::-1]
        assert [batch.id async for batch in run.client.batches.list(after="")] == ids[::-1]


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
async def test_a_page_of_none_is_empty(settings: BatchSettings, path: str) -> None:
    """As OpenAI answers it; and an empty cursor is none."""
    async with running(settings) as run:
        await run.submit(numbered(1))
        empty: dict[str, Any] = {
            "object": "list",
            "data": [],
            "first_id": None,
            "last_id": None,
            "has_more": False,
        }
        assert (await run.http.get(path, params={"limit": 0})).json() == empty
        first = await run.http.get(path, params={"limit": 1, "after": ""})
        assert len(first.json()["data"]) == 1


async def test_cancel_keeps_what_is_done(settings: BatchSettings) -> None:
    model = FakeModel()
    lines = [line(f"fast-{n}", f"fast {n}") for n in range(3)]
    async with running(settings, model) as run:
        batch = await run.submit(jsonl(lines))
        await run.until(batch.id, "completed")
        model.open.clear()
        batch = await run.submit(numbered(200))
        await eventually(lambda: model.running > 0)
        cancelled = await run.client.batches.cancel(batch.id)
        assert cancelled.status == "cancelling"
        batch = await run.until(batch.id, "cancelled")
        assert model.running == 0  # the requests in flight were stopped, not waited for
        errors = await run.lines_of(batch.error_file_id)
        assert len(errors) == 200
        assert {each["error"]["code"] for each in errors.values()} == {"batch_cancelled"}
        assert {each["response"] for each in errors.values()} == {None}
        with pytest.raises(openai.BadRequestError) as caught:
            await run.client.batches.cancel(batch.id)
        assert caught.value.code == "batch_not_cancellable"


async def test_what_is_cancelled_midway_has_each_line_once(settings: BatchSettings) -> None:
    """And a batch may be cancelled before it has lines; `metadata` may be null."""
    model = FakeModel()
    async with running(settings, model) as run:
        first = [line(f"first-{n}", f"fail:400:9:{n}") for n in range(3)]
        more = [line(f"more-{n}", f"more {n}") for n in range(300)]
        batch = await run.submit(jsonl([*first, *more]), metadata=None)
        await eventually(lambda: len(model.seen) >= 100)
        model.open.clear()
        await run.client.batches.cancel(batch.id)
        await run.client.batches.cancel(batch.id)  # the first answer may have been lost
        batch = await run.until(batch.id, "cancelled", "completed")
        output = await run.lines_of(batch.output_file_id)
        errors = await run.lines_of(batch.error_file_id)
        assert not output.keys() & errors.keys()
        assert output.keys() | errors.keys() == {each["custom_id"] for each in [*first, *more]}
        counts = batch.request_counts
        unrun = [each for each in errors.values() if each["error"] is not None]
        assert (counts.completed, counts.failed) == (len(output), len(errors) - len(unrun))
        assert counts.completed + counts.failed + len(unrun) == counts.total
        model.open.set()

        await run.service.stop()
        early = await run.submit(numbered(1))
        assert early.status == "validating"
        assert (await run.client.batches.cancel(early.id)).status == "cancelling"
    async with running(settings) as run:
        early = await run.until(early.id, "cancelled")
        assert (early.output_file_id, early.error_file_id) == (None, None)


async def test_expiry_keeps_the_partial_output(settings: BatchSettings, clock: FakeClock) -> None:
    model = FakeModel()
    async with running(settings, model, clock) as run:
        first = [line(f"first-{n}", f"fail:503:{10**9}:{n}") for n in range(3)]
        content = jsonl([*first, line("done", "quick")])
        batch = await run.submit(content, deadline="30m")
        assert batch.deadline == batch.expires_at == int(clock.now_s) + 1800
        await eventually(lambda: model.seen["quick"] == 1 and len(model.seen) == 4)
        clock.advance(1801)
        batch = await run.until(batch.id, "expired")
        assert set(await run.lines_of(batch.output_file_id)) == {"done"}
        errors = await run.lines_of(batch.error_file_id)
        assert {each["error"]["code"] for each in errors.values()} == {"batch_expired"}
        assert (batch.request_counts.total, batch.request_counts.completed) == (4, 1)
        assert batch.deadline_state == "missed"


async def test_a_refused_file_names_its_lines(settings: BatchSettings) -> None:
    bad = [line("a"), line("a"), line("b", url="/v1/embeddings"), line("c", body={"stream": True})]
    content = jsonl(bad) + b"{not json}\n"
    async with running(settings) as run:
        batch = await run.until((await run.submit(content)).id, "failed")
        found = [(error.line, error.code) for error in batch.errors.data]
        assert found == [
            (2, "duplicate_custom_id"),
            (3, "mismatched_url"),
            (4, "stream_not_supported"),
            (5, "invalid_json_line"),
        ]
        assert (batch.output_file_id, batch.request_counts.total) == (None, 0)
        assert run.model.bodies == []


async def test_one_idempotency_key_makes_one_batch(settings: BatchSettings) -> None:
    async with running(settings) as run:
        file_id = await run.upload(numbered(1))
        arguments = batch_body(file_id)
        headers = {"Idempotency-Key": "once"}
        made = [
            await run.client.batches.create(**arguments, extra_headers=headers) for _ in range(3)
        ]
        assert len({batch.id for batch in made}) == 1
        other = batch_body(file_id, completion_window="1h")
        with pytest.raises(openai.BadRequestError) as caught:
            await run.client.batches.create(**other, extra_headers=headers)
        assert caught.value.code == "idempotency_key_reused"
        assert (await run.client.batches.create(**arguments)).id != made[0].id
        for each in [batch async for batch in run.client.batches.list()]:
            await run.until(each.id, "completed")
        await run.client.files.delete(file_id)
        again = await run.client.batches.create(**arguments, extra_headers=headers)
        assert again.id == made[0].id


async def test_one_key_neither_sees_nor_takes_anothers(settings: BatchSettings) -> None:
    model = FakeModel(api_keys=("server", "alice", "bob"))
    async with running(settings, model) as run:
        alice, bob = run.client_of("alice"), run.client_of("bob")
        file_id = await run.upload(numbered(2), alice)
        with pytest.raises(openai.BadRequestError) as caught:
            await bob.batches.create(**batch_body(file_id))
        assert caught.value.code == "file_not_found"
        batch = await alice.batches.create(**batch_body(file_id))
        for call in (
            bob.batches.retrieve(batch.id),
            bob.batches.cancel(batch.id),
            bob.files.retrieve(file_id),
            bob.files.content(file_id),
            bob.files.delete(file_id),
            bob.files.list(after=file_id),
            bob.batches.list(after=batch.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await call
        assert [each async for each in bob.batches.list()] == []
        assert [each async for each in bob.files.list()] == []
        run.client = alice
        batch = await run.until(batch.id, "completed")
        with pytest.raises(openai.NotFoundError):
            await bob.files.content(batch.output_file_id)
        assert len(await run.lines_of(batch.output_file_id)) == 2
        with pytest.raises(openai.AuthenticationError):
            await run.client_of("eve").batches.list()


async def test_an_open_server_has_one_tenant(tmp_path: Path) -> None:
    settings = BatchSettings(data_dir=tmp_path, tenant_by_key=False)
    async with running(settings) as run:
        file_id = await run.upload(numbered(1), run.client_of("one"))
        assert (await run.client_of("two").files.retrieve(file_id)).id == file_id


async def test_files_expire_and_inputs_of_live_batches_wait(
    settings: BatchSettings, clock: FakeClock
) -> None:
    model = FakeModel()
    async with running(settings, model, clock) as run:
        file = await run.client.files.create(
            file=("in.jsonl", numbered(2)),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert file.expires_at == file.created_at + 3600
        model.open.clear()
        expiry = {"anchor": "created_at", "seconds": 7200}
        body = batch_body(file.id, output_expires_after=expiry)
        batch = await run.client.batches.create(**body)
        await eventually(lambda: model.running > 0)
        with pytest.raises(openai.BadRequestError) as caught:
            await run.client.files.delete(file.id)
        assert caught.value.code == "file_in_use"
        clock.advance(3601)
        with pytest.raises(openai.NotFoundError):
            await run.client.files.retrieve(file.id)
        await run.service.stores.files.collect()
        assert (settings.data_dir / "files" / file.id).exists()
        model.open.set()
        batch = await run.until(batch.id, "completed")
        output = await run.client.files.retrieve(batch.output_file_id)
        assert output.expires_at == output.created_at + 7200
        assert await run.service.stores.files.collect() == 1
        clock.advance(7201)
        assert await run.service.stores.files.collect() == 1
        assert list((settings.data_dir / "files").iterdir()) == []


async def test_an_endpoint_the_model_lacks_is_refused_at_once(settings: BatchSettings) -> None:
    async with running(settings) as run:
        file_id = await run.upload(numbered(1))
        with pytest.raises(openai.BadRequestError) as caught:
            await run.client.batches.create(**batch_body(file_id, endpoint="/v1/responses"))
        assert caught.value.code == "endpoint_not_served"


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/score", {"text_1": "x", "text_2": ["y", "z"]}),
        ("/v1/score", {"queries": "x", "documents": ["y", "z"]}),
        ("/v1/rerank", {"query": "x", "documents": ["y", "z"]}),
    ],
)
async def test_vectors_and_scores_have_usage_and_no_output_tokens(
    settings: BatchSettings, url: str, asked: dict[str, Any]
) -> None:
    body = {"model": "fake", **asked}
    row = {"custom_id": "e", "method": "POST", "url": url, "body": body}
    async with running(settings) as run:
        wanted = batch_body(await run.upload(jsonl([row])), endpoint=url)
        batch = await run.client.batches.create(**wanted)
        batch = await run.until(batch.id, "completed")
        assert (batch.usage.input_tokens, batch.usage.output_tokens) == (5, 0)


async def test_results_are_written_outside_the_loop(
    settings: BatchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which answers chats, however slow the disk is."""
    written_by = set[int]()

    def told(name: str) -> None:
        method = getattr(Staging, name)

        def tell(*arguments: Any) -> None:
            written_by.add(threading.get_ident())
            method(*arguments)

        monkeypatch.setattr(Staging, name, tell)

    async with running(settings) as run:
        file_id = await run.upload(numbered(2 * ASSEMBLY_ROWS + 1))
        told("write")
        told("finish")
        batch = await run.client.batches.create(**batch_body(file_id))
        batch = await run.until(batch.id, "completed")
        content = (await run.client.files.content(batch.output_file_id)).text
    names = [json.loads(text)["custom_id"] for text in content.splitlines()]
    assert names == [f"request-{n}" for n in range(2 * ASSEMBLY_ROWS + 1)]
    assert written_by
    assert threading.get_ident() not in written_by


async def test_never_more_in_flight_than_the_window(tmp_path: Path) -> None:
    settings = BatchSettings(data_dir=tmp_path, poll_s=0.05, max_in_flight=3)
    async with running(settings) as run:
        await run.until((await run.submit(numbered(40))).id, "completed")
        assert 1 <= run.model.most_running <= 3


async def test_stop_drains_and_gives_back(tmp_path: Path) -> None:
    settings = BatchSettings(data_dir=tmp_path, poll_s=0.05, max_in_flight=4, lease_s=3600)
    model = FakeModel()
    model.open.clear()
    async with running(settings, model) as run:
        batch = await run.submit(numbered(10))
        await eventually(lambda: model.running == 4)
    assert model.running == 0
    async with running(settings) as run:
        batch = await run.until(batch.id, "completed")
        assert len(await run.lines_of(batch.output_file_id)) == 10


async def test_stop_waits_for_lines_in_flight(tmp_path: Path) -> None:
    settings = BatchSettings(data_dir=tmp_path, poll_s=0.05, drain_s=60)
    model = FakeModel()
    model.open.clear()
    async with running(settings, model) as run:
        batch = await run.submit(numbered(5))
        await eventually(lambda: model.running == 5)
        run.service._worker.stop()
        model.open.set()
        await run.service.stop()
        counts = (await run.client.batches.retrieve(batch.id)).request_counts
        assert counts is not None
        assert counts.completed == 5


async def test_two_processes_share_one_folder(settings: BatchSettings) -> None:
    narrow = settings.model_copy(update={"max_in_flight": 2})
    first, second = FakeModel(), FakeModel()
    first.open.clear()
    async with running(narrow, first) as one, running(narrow, second):
        batch = await one.submit(numbered(60))
        # The first holds two lines and can do no more: the rest is done by the second.
        await eventually(lambda: first.running == 2 and sum(second.seen.values()) == 58)
        first.open.set()
        batch = await one.until(batch.id, "completed")
        assert (first.seen + second.seen).most_common(1)[0][1] == 1
        assert len(await one.lines_of(batch.output_file_id)) == 60


@pytest.mark.parametrize("group_prefixes", [True, False])
async def test_shared_beginnings_run_together(tmp_path: Path, group_prefixes: bool) -> None:
    settings = BatchSettings(
        data_dir=tmp_path, poll_s=POLL_S, max_in_flight=1, group_prefixes=group_prefixes
    )
    heads = [f"head {n} " * 100 for n in range(3)]
    rows = [line(f"{n}", f"{heads[n % 3]}{n}") for n in range(12)]
    async with running(settings) as run:
        await run.until((await run.submit(jsonl(rows))).id, "completed")
        order = [body["messages"][0]["content"][:6] for body in run.model.bodies]
    changes = sum(a != b for a, b in pairwise(order))
    assert changes == (2 if group_prefixes else 11)


async def test_an_old_leaving_in_staging_is_cleared(settings: BatchSettings) -> None:
    settings.staging_dir.mkdir(parents=True)
    for name, age_s in (("old", 7200), ("fresh", 60)):
        (settings.staging_dir / name).write_bytes(b"x")
        moment = time.time() - age_s
        os.utime(settings.staging_dir / name, (moment, moment))
    async with running(settings) as run:
        await run.client.batches.list()
        assert os.listdir(settings.staging_dir) == ["fresh"]


async def test_a_miss_is_foretold_once(
    settings: BatchSettings, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    model = FakeModel()
    model.open.clear()
    async with running(settings, model, clock) as run:
        await run.client.batches.list()
        await run.service.stores.harvest.add("w", 1, Tokens(output=1), 100.0)
        batch = await run.submit(numbered(100), deadline="10m")
        assert batch.deadline_state == "will_miss"
        for _ in range(2):
            await run.service._worker._warn_of_misses()
    foretold = [record for record in caplog.records if "will miss" in record.getMessage()]
    assert [record.args for record in foretold] == [(batch.id,)]
