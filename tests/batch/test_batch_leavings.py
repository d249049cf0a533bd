"""What dead processes, old workers and stubborn files leave behind: it goes, and harms nothing."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from alembic import command
from sqlalchemy import Connection, text

from conserve.batch.contents import MOVING, STALE_S
from conserve.batch.database import Database, alembic_config
from conserve.batch.errors import NotFoundError, StoreUnavailableError
from conserve.batch.file_store import BATCH_OUTPUT, STALE_UPLOAD_S, Upload
from conserve.batch.lifecycle import Status
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from tests.batch.batch_fakes import FakeClock, eventually, running
from tests.batch.builders import TENANT, numbered, stored_file

pytestmark = pytest.mark.anyio

EXPIRES_S = 3600


async def expiring_file(stores: Stores) -> str:
    staged = stores.contents.staging_dir / "staged"
    staged.write_bytes(b"x\n")
    upload = Upload(TENANT, "in.jsonl", "batch", 2, 1, expires_after_s=EXPIRES_S)
    return (await stores.files.add(upload, staged)).id


def blobs(stores: Stores) -> set[str]:
    return set(os.listdir(stores.contents._root))


async def test_files_that_cannot_be_deleted_keep_no_other(
    stores: Stores,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And the log has two lines, however many they are."""
    monkeypatch.setattr("conserve.batch.file_store.COLLECT_ROWS", 2)
    every = [await expiring_file(stores) for _ in range(7)]
    stuck = set(every[:3])
    delete = stores.contents.delete

    async def refuse(file_id: str) -> None:
        if file_id in stuck:
            raise StoreUnavailableError("no") from PermissionError(1, "Operation not permitted")
        await delete(file_id)

    monkeypatch.setattr(stores.contents, "delete", refuse)
    clock.advance(EXPIRES_S)
    assert await stores.files.collect() == 4
    assert blobs(stores) == stuck
    assert [record.args for record in caplog.records] == [mock.ANY, (2,)]
    assert await stores.files.collect() == 0
    monkeypatch.undo()
    assert await stores.files.collect() == 3
    assert blobs(stores) == set()


async def test_a_folder_in_a_files_place_keeps_no_other(stores: Stores, clock: FakeClock) -> None:
    """On a real disk: what is there cannot be unlinked."""
    first, second = await expiring_file(stores), await expiring_file(stores)
    path = Path(stores.contents._root) / first
    path.unlink()
    path.mkdir()
    clock.advance(EXPIRES_S)
    assert await stores.files.collect() == 1
    assert blobs(stores) == {first}
    with pytest.raises(NotFoundError):
        await stores.files.get(TENANT, second)


async def test_leavings_go_while_the_service_runs(
    settings: BatchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conserve.batch.worker.COLLECT_EVERY_S", 0.05)
    async with running(settings) as run:
        await run.client.files.list()
        staging, files = settings.staging_dir, settings.data_dir / "files"
        (alive,) = os.listdir(settings.workers_dir)
        buried = settings.workers_dir / "worker-buried"
        moment = time.time() - STALE_S - 60
        for path in (staging / "old", staging / "fresh", files / f"old{MOVING}", buried):
            path.write_bytes(b"x")
            if path.name != "fresh":
                os.utime(path, (moment, moment))
        await eventually(lambda: os.listdir(staging) == ["fresh"] and os.listdir(files) == [])
        await eventually(lambda: os.listdir(settings.workers_dir) == [alive])


async def test_a_leaving_that_cannot_be_cleared_keeps_no_other(stores: Stores) -> None:
    staging = stores.contents.staging_dir
    moment = time.time() - STALE_S - 60
    (staging / "a-folder").mkdir()
    (staging / "b-file").write_bytes(b"x")
    for name in ("a-folder", "b-file"):
        os.utime(staging / name, (moment, moment))
    await stores.contents.clear_leavings()
    assert os.listdir(staging) == ["a-folder"]


async def test_a_kept_file_nobody_showed_is_collected(stores: Stores, clock: FakeClock) -> None:
    staged = stores.contents.staging_dir / "staged"
    staged.write_bytes(b"x\n")
    file = await stores.files.keep(Upload(TENANT, "out.jsonl", BATCH_OUTPUT, 2, 1), staged)
    with pytest.raises(NotFoundError):
        await stores.files.get(TENANT, file.id)
    assert await stores.files.collect() == 0
    clock.advance(STALE_UPLOAD_S + 1)
    assert await stores.files.collect() == 1
    assert blobs(stores) == set()


async def test_an_upload_that_was_taken_for_dead_says_so(
    stores: Stores, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = stores.contents.keep

    async def slowly(staged: Path, blob_id: str) -> None:
        await keep(staged, blob_id)
        clock.advance(STALE_UPLOAD_S + 1)
        assert await stores.files.collect() == 1

    monkeypatch.setattr(stores.contents, "keep", slowly)
    with pytest.raises(StoreUnavailableError, match="too long"):
        await stored_file(stores, numbered(1))


BATCHES = [("a", "completed", 3, False), ("b", "completed", 5, True), ("c", "in_progress", 7, True)]


async def test_a_store_of_the_first_version_is_brought_up_to_date(
    tmp_path: Path, database_url: str, clock: FakeClock
) -> None:
    """Sums of what ended are made; results that lost their lines to two workers go."""
    database = Database(database_url)
    if database.is_sqlite:
        await asyncio.to_thread(Path(database._file).touch)
    async with database.write() as connection:
        await connection.run_sync(lambda made: command.upgrade(alembic_config(made), "0001"))
        await connection.run_sync(fill_first_version)
    await database.close()
    stores = Stores(BatchSettings(data_dir=tmp_path, database_url=database_url), clock)
    await stores.prepare()
    sums = await stores.ended.sums()
    assert (sums[Status.COMPLETED].num_batches, sums[Status.COMPLETED].completed) == (2, 8)
    assert sums[Status.FAILED].num_batches == 0
    async with stores.database.read() as connection:
        left = (await connection.execute(text("SELECT batch_id FROM results"))).scalars()
        assert sorted(left) == ["b", "c"]
    await stores.close()


def fill_first_version(connection: Connection) -> None:
    for batch_id, status, completed, has_lines in BATCHES:
        values: dict[str, Any] = {"id": batch_id, "status": status, "completed": completed}
        values |= {"total": completed, "failed": 0, "has_lines": has_lines, "expiring": False}
        values |= dict.fromkeys(("tenant", "endpoint", "input_file_id", "completion_window"), "x")
        values |= dict.fromkeys(("priority", "not_before", "created_at", "expires_at"), 1)
        tokens = ("input", "cached", "output", "reasoning", "estimated")
        values |= {f"{kind}_tokens": 0 for kind in tokens}
        names = ", ".join(values)
        marks = ", ".join(f":{name}" for name in values)
        connection.execute(text(f"INSERT INTO batches ({names}) VALUES ({marks})"), values)
        insert = "INSERT INTO results VALUES (:id, 1, :failed, :payload)"
        row = {"id": batch_id, "failed": False, "payload": b"{}"}
        connection.execute(text(insert), row)
