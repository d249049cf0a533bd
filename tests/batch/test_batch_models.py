"""Servers of several models on one store: each takes what is its own, and no more."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from conserve.batch.file_store import FileStore
from conserve.batch.first_line import first_model
from conserve.batch.settings import BatchSettings
from tests.batch.batch_fakes import FakeModel, eventually, running
from tests.batch.builders import batch_body, jsonl, line, numbered

pytestmark = pytest.mark.anyio


def of_other(count: int) -> bytes:
    return jsonl([line(f"other-{n}", f"other {n}", body={"model": "other"}) for n in range(count)])


def waits(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.getMessage() for record in caplog.records]
    return [message for message in said if "waits for a server" in message]


async def test_no_server_takes_a_line_of_anothers_model(tmp_path: Path, database_url: str) -> None:
    settings = BatchSettings(data_dir=tmp_path, database_url=database_url, poll_s=0.05)
    first, second = FakeModel(), FakeModel(name="other")
    async with running(settings, first) as one, running(settings, second) as two:
        ours = await one.submit(numbered(40))
        theirs = await two.submit(of_other(40))
        assert (ours.model, theirs.model) == ("fake", "other")
        await one.until(ours.id, "completed")
        await two.until(theirs.id, "completed")
        assert {body["model"] for body in first.bodies} == {"fake"}
        assert {body["model"] for body in second.bodies} == {"other"}
        assert len(first.bodies) == len(second.bodies) == 40


async def test_a_batch_waits_for_a_server_of_its_model(
    settings: BatchSettings, caplog: pytest.LogCaptureFixture
) -> None:
    away = FakeModel()
    away.open.clear()
    async with running(settings, away) as run:
        batch = await run.submit(numbered(5))
        await eventually(lambda: away.running == 5)
    stranger = FakeModel(name="other")
    async with running(settings, stranger) as run:
        await run.until((await run.submit(of_other(3))).id, "completed")
        await eventually(lambda: bool(waits(caplog)))
        (worker_id,) = await run.service.stores.workers.others("nobody")
        await run.service._worker._warn_of_strangers(worker_id)
        assert (await run.client.batches.retrieve(batch.id)).status == "in_progress"
        assert len(stranger.bodies) == 3
    async with running(settings) as run:
        batch = await run.until(batch.id, "completed")
        assert batch.request_counts.completed == 5
    assert waits(caplog) == [f"{batch.id} waits for a server of 'fake'"]


async def test_a_storage_that_hangs_keeps_no_warning(
    settings: BatchSettings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: Any) -> int:
        return int(await asyncio.Event().wait())

    async with running(settings) as run:
        run.model.open.clear()
        batch = await run.submit(numbered(1))
        await eventually(lambda: run.model.running == 1)
    monkeypatch.setattr(FileStore, "collect", hang)
    async with running(settings, FakeModel(name="other")):
        await eventually(lambda: bool(waits(caplog)))
    assert waits(caplog) == [f"{batch.id} waits for a server of 'fake'"]


async def test_a_model_that_is_not_served_makes_no_batch(settings: BatchSettings) -> None:
    async with running(settings) as run:
        file_id = await run.upload(b"\n\n" + of_other(2))
        body = batch_body(file_id)
        answer = await run.http.post("/v1/batches", json=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "input_file_id")
        assert "'other'" in error["message"]
        assert "served: fake" in error["message"]
        assert (await run.http.get("/v1/batches")).json()["data"] == []


async def test_a_server_that_does_not_say_its_models_is_asked_again(
    settings: BatchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(settings) as run:
        file_id = await run.upload(numbered(1))
        body = batch_body(file_id)
        executor = run.service._executor

        async def silent() -> None:
            raise httpx.ReadTimeout("no answer")

        with monkeypatch.context() as patch:
            patch.setattr(executor, "models", silent)
            answer = await run.http.post("/v1/batches", json=body)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        made = (await run.http.post("/v1/batches", json=body)).json()
        await run.until(made["id"], "completed")


@pytest.mark.parametrize(
    ("chunks", "model"),
    [
        ([b'{"body": {"model": "a"}}\n{"body": {"model": "b"}}'], "a"),
        ([b"\n ", b"\r\n", b'{"body": {"mo', b'del": "a"}}', b"\nrest"], "a"),
        ([b'{"body": {"model": "a"}}'], "a"),
        ([b'{"body": {"model": 7}}\n'], None),
        ([b'{"body": {}}\n{"body": {"model": "b"}}'], None),
        ([b"\xff\n"], None),
        ([b"[" * 5000], None),
        ([b"x" * 300, b'{"body": {"model": "late"}}\n'], None),
        ([], None),
    ],
)
async def test_the_first_line_tells(chunks: list[bytes], model: str | None) -> None:
    class Chunks:
        def __init__(self) -> None:
            self.left = list(chunks)

        def __aiter__(self) -> Chunks:
            return self

        async def __anext__(self) -> bytes:
            if not self.left:
                raise StopAsyncIteration
            return self.left.pop(0)

    assert await first_model(Chunks(), 200) == model
