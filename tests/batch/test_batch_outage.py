"""The database goes away, at the start and in the middle of a batch, and comes back."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
from contextlib import closing
from pathlib import Path

import openai
import pytest
from batch_fakes import FakeModel, eventually, numbered, running
from batch_postgres import Postgres
from sqlalchemy import select

from conserve.batch.database import Database
from conserve.batch.schema import workers
from conserve.batch.settings import BatchSettings

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
