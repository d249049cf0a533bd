"""The database goes away, at the start and in the middle of a batch, and comes back."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import threading
from collections import Counter
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import openai
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from sqlalchemy import select, text

from conserve.batch import database as database_module
from conserve.batch import dispatcher as dispatcher_module
from conserve.batch import put_aside
from conserve.batch.database import Database
from conserve.batch.errors import StoreUnavailableError
from conserve.batch.lease_store import LeaseStore
from conserve.batch.outcome import Postponed
from conserve.batch.schema import workers
from conserve.batch.settings import BatchSettings
from tests.batch.batch_fakes import FakeModel, eventually, running
from tests.batch.batch_postgres import Postgres
from tests.batch.builders import jsonl, line, numbered

pytestmark = pytest.mark.anyio


async def test_an_outage_costs_no_line(
    tmp_path: Path, postgres: Postgres, postgres_url: str
) -> None:
    settings = BatchSettings(
        data_dir=tmp_path, database_url=postgres_url, poll_s=0.05, max_in_flight=8
    )
    model = FakeModel()
    await asyncio.to_thread(postgres.halt)
    try:
        async with running(settings, model) as run:
            for call in (run.client.batches.list(), run.upload(numbered(1))):
                with pytest.raises(openai.InternalServerError) as caught:
                    await call
                assert caught.value.status_code == 503
                assert caught.value.code == "store_unavailable"
                assert int(caught.value.response.headers["retry-after"]) > 0
            await asyncio.to_thread(postgres.resume)
            batch = await run.submit(numbered(300))
            model.open.clear()
            await eventually(lambda: model.running > 0)
            await asyncio.to_thread(postgres.halt)
            model.open.set()
            await eventually(lambda: model.running == 0)
            with pytest.raises(openai.InternalServerError):
                await run.client.batches.retrieve(batch.id)
            await asyncio.to_thread(postgres.resume)
            batch = await run.until(batch.id, "completed")
            assert batch.request_counts.completed == 300
            assert len(await run.lines_of(batch.output_file_id)) == 300
    finally:
        await asyncio.to_thread(postgres.resume_if_halted)


async def test_files_may_live_elsewhere(tmp_path: Path) -> None:
    settings = BatchSettings(data_dir=tmp_path, poll_s=0.05, files_url="memory://batches")
    async with running(settings) as run:
        batch = await run.until((await run.submit(numbered(20))).id, "completed")
        assert len(await run.lines_of(batch.output_file_id)) == 20
        await run.client.files.delete(batch.input_file_id)
        with pytest.raises(openai.NotFoundError):
            await run.client.files.content(batch.input_file_id)
    assert not (tmp_path / "files").exists()


class Lost(Exception):  # noqa: N818
    """What a driver raises is its own affair: botocore's errors are no OSError either."""


class Elsewhere(MemoryFileSystem):  # type: ignore[misc]
    """A storage that can go away."""

    protocol = "elsewhere"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    is_away = False
    unreadable = ""
    """Part of the path of a file that cannot be read."""

    def _open(self, *words: Any, **named: Any) -> Any:
        if Elsewhere.is_away:
            raise Lost
        return super()._open(*words, **named)

    def cat_file(self, path: str, *words: Any, **named: Any) -> Any:
        if Elsewhere.is_away or (Elsewhere.unreadable and Elsewhere.unreadable in path):
            raise Lost
        return super().cat_file(path, *words, **named)

    def put_file(self, *words: Any, **named: Any) -> None:
        if Elsewhere.is_away:
            raise Lost
        super().put_file(*words, **named)


async def test_a_storage_that_is_away_costs_no_line(tmp_path: Path) -> None:
    fsspec.register_implementation("elsewhere", Elsewhere, clobber=True)
    settings = BatchSettings(
        data_dir=tmp_path, poll_s=0.05, files_url="elsewhere://b", max_in_flight=4
    )
    model = FakeModel()
    async with running(settings, model) as run:
        model.open.clear()
        batch = await run.submit(numbered(40))
        await eventually(lambda: model.running == 4)
        Elsewhere.is_away = True
        try:
            for call in (run.upload(numbered(1)), run.client.files.content(batch.input_file_id)):
                with pytest.raises(openai.InternalServerError) as caught:
                    await call
                assert (caught.value.status_code, caught.value.code) == (503, "store_unavailable")
            model.open.set()
            await eventually(lambda: model.running == 0)
        finally:
            Elsewhere.is_away = False
        batch = await run.until(batch.id, "completed")
        assert len(await run.lines_of(batch.output_file_id)) == 40
        assert {body["messages"][0]["content"] for body in model.bodies} == {
            f"prompt {n}" for n in range(40)
        }


async def test_an_input_that_cannot_be_read_keeps_no_other_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(put_aside, "ASIDE_S", 0.1)
    fsspec.register_implementation("elsewhere", Elsewhere, clobber=True)
    settings = BatchSettings(
        data_dir=tmp_path,
        poll_s=0.05,
        files_url="elsewhere://c",
        max_in_flight=4,
        max_attempts=1,
    )
    model = FakeModel()
    async with running(settings, model) as run:
        model.open.clear()
        batch = await run.submit(numbered(40))
        await eventually(lambda: model.running == 4)
        monkeypatch.setattr(Elsewhere, "unreadable", batch.input_file_id)
        model.open.set()
        await run.until((await run.submit(numbered(20))).id, "completed")
        batch = await run.until(batch.id, "in_progress")
        assert (batch.request_counts.completed, batch.request_counts.failed) == (4, 0)
        monkeypatch.setattr(Elsewhere, "unreadable", "")
        batch = await run.until(batch.id, "completed")
        assert batch.request_counts.completed == 40


async def test_a_line_given_out_again_while_its_try_is_stored_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database goes away when a try is stored, but for its answer: the line has been put back
    and is given out again, before the try is stored a second time."""
    record, waiting = LeaseStore.record, LeaseStore.waiting
    counts = Counter[str]()

    async def half(self: LeaseStore, worker_id: str | None, outcomes: Any) -> Any:
        stored = await record(self, worker_id, outcomes)
        if any(isinstance(one, Postponed) for one in outcomes):
            counts["tries stored"] += 1
            if counts["tries stored"] == 1:
                raise StoreUnavailableError("gone")
        return stored

    async def look(self: LeaseStore, *words: Any) -> Any:
        counts["looks"] += 1
        return await waiting(self, *words)

    monkeypatch.setattr(LeaseStore, "record", half)
    monkeypatch.setattr(LeaseStore, "waiting", look)
    monkeypatch.setattr(dispatcher_module, "STORE_RETRY_S", 1.5)  # longer than a line is put off
    settings = BatchSettings(data_dir=tmp_path, poll_s=0.05, max_in_flight=8)
    async with running(settings) as run:
        batch_id = (await run.submit(jsonl([line("a", "fail:503:1:x")]))).id
        await eventually(lambda: counts["tries stored"] == 1)
        run.model.open.clear()
        await eventually(lambda: counts["tries stored"] == 2 and run.model.running > 0)
        enough = counts["looks"] + 3
        await eventually(lambda: counts["looks"] >= enough)
        run.model.open.set()
        await run.until(batch_id, "completed")
        assert run.model.seen["fail:503:1:x"] == 2


async def cancel_a_writer(database: Database, turns: int) -> None:
    """Cancel it between its queries or within one, so many turns of the loop after the first."""
    answered = asyncio.Event()

    async def write() -> None:
        async with database.write() as connection:
            await connection.execute(workers.insert().values(id="w", expires_at=1))
            while True:
                await connection.execute(select(workers))
                answered.set()

    writer = asyncio.create_task(write())
    await answered.wait()
    for _ in range(turns):
        await asyncio.sleep(0)
    writer.cancel()
    await asyncio.gather(writer, return_exceptions=True)


async def test_a_cancelled_writer_gives_its_lock_back(tmp_path: Path) -> None:
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/x.db")
    await database.migrate()
    gc.disable()  # which would give the lock back some time later
    try:
        for turns in range(40):
            await cancel_a_writer(database, turns)
            with closing(sqlite3.connect(tmp_path / "x.db", timeout=0)) as other:
                other.execute("BEGIN IMMEDIATE")
    finally:
        gc.enable()
        await database.close()


async def give_up_within_a_query(database: Database) -> threading.Thread:
    """Close the database while a query is left to itself by cancellations. Returns the thread that
    ran it, as it is when the database says it is closed."""
    entered, leave = threading.Event(), threading.Event()

    def hold() -> int:
        entered.set()
        leave.wait()
        return 0

    async def ask() -> None:
        async with database.read() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            await driver.create_function("hold", 0, hold)
            await connection.execute(text("SELECT hold()"))

    others = set(threading.enumerate())
    asking = asyncio.create_task(ask())
    await asyncio.to_thread(entered.wait)
    (querying,) = (each for each in threading.enumerate() if is_sqlites(each, others))
    for _ in range(2):
        asking.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([asking])
    closed = asyncio.create_task(database.close())
    await asyncio.sleep(0)
    leave.set()
    await closed
    return querying


async def test_a_closed_database_runs_nothing_any_more(tmp_path: Path) -> None:
    """A thread that still ran would answer an event loop that may be gone. Many times, since it
    may also be quick enough by itself."""
    for _ in range(30):
        database = Database(f"sqlite+aiosqlite:///{tmp_path}/x.db")
        thread = await give_up_within_a_query(database)
        assert not thread.is_alive()


def is_sqlites(thread: threading.Thread, others: Collection[threading.Thread]) -> bool:
    return thread not in others and "_connection_worker_thread" in thread.name


async def test_a_migration_takes_the_time_it_takes(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On many rows, where any other statement would be given up."""
    wait = text("SELECT pg_sleep(1)")
    monkeypatch.setattr(database_module, "STATEMENT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(database_module, "_upgrade", lambda connection: connection.execute(wait))
    database = Database(postgres_url)
    await database.migrate()
    with pytest.raises(StoreUnavailableError):
        async with database.write() as connection:
            await connection.execute(wait)
    await database.close()


async def test_a_migration_waits_for_no_lock_for_ever(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "LOCK_TIMEOUT_S", 1)
    holder, database = Database(postgres_url), Database(postgres_url)
    lock = text(f"SELECT pg_advisory_xact_lock({database_module.MIGRATION_LOCK})")
    async with holder.write() as connection:
        await connection.execute(lock)
        with pytest.raises(StoreUnavailableError):
            await database.migrate()
    await database.migrate()
    for each in (holder, database):
        await each.close()
