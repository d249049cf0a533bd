"""Nobody but the server's own user reads what lies in its data folder."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from conserve.batch.contents import FileContents
from conserve.batch.errors import StoreUnavailableError
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from tests.batch.batch_fakes import running
from tests.batch.builders import jsonl, line

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """A user whose files everybody may read and write."""
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(folder: Path) -> list[str]:
    found = [folder, *folder.rglob("*")]
    return [f"{path.name} {path.stat().st_mode:o}" for path in found if path.stat().st_mode & 0o077]


async def test_all_that_a_batch_leaves_is_private(settings: BatchSettings) -> None:
    async with running(settings) as run:
        batch = await run.submit(jsonl([line("a", "hello"), line("b", "fail:400:1")]))
        batch = await run.until(batch.id, "completed")
        assert batch.output_file_id
        assert batch.error_file_id
        names = {path.name for path in settings.data_dir.rglob("*")}
        assert {batch.input_file_id, "batches.db", "batches.db-wal", "staging", "workers"} <= names
        assert open_to_others(settings.data_dir) == []


async def test_no_error_of_the_database_says_what_people_sent(
    stores: Stores,
) -> None:
    """It is logged, and an owner is told of it where a batch fails."""
    row = {"tenant": "t", "served": 1.0, "secret": "private words"}
    statement = text("INSERT INTO shares (tenant, served) VALUES (:tenant, :secret, :served)")
    with pytest.raises((StoreUnavailableError, DBAPIError)) as failed:
        async with stores.database.write() as connection:
            await connection.execute(statement, row)
    told = "".join(traceback.format_exception(failed.value))
    assert "INSERT INTO shares" in told
    assert "private words" not in told


async def test_what_an_earlier_server_left_open_is_closed(settings: BatchSettings) -> None:
    async with running(settings) as run:
        await run.upload(b"{}")
    left = [settings.data_dir / "batches.db-wal", settings.data_dir / "batches.db-shm"]
    for path in left:
        path.touch()
    for path in settings.data_dir.rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o666)
    async with running(settings) as run:
        await run.upload(b"{}")
        files = settings.data_dir / "files"
        seen = {path for path in settings.data_dir.rglob("*") if path.parent != files}
        assert [path for path in seen if path.stat().st_mode & 0o077] == []
        assert len(list(files.iterdir())) == 2  # the first cannot be reached any more


async def test_a_folder_of_the_operators_stays_as_it_is(tmp_path: Path) -> None:
    shared, home = tmp_path / "shared", tmp_path / "home"
    for folder in (shared, home):
        folder.mkdir(0o775)
    settings = BatchSettings(data_dir=home, files_url=f"file://{shared}", poll_s=0.05)
    async with running(settings) as run:
        await run.upload(b"{}")
    assert [folder.stat().st_mode & 0o777 for folder in (shared, home)] == [0o775, 0o775]
    assert [path.stat().st_mode & 0o077 for path in shared.iterdir()] == [0]


async def test_a_file_that_moves_between_disks_is_private_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = FileContents(f"file://{tmp_path}/files", tmp_path / "staging")
    await contents.prepare()
    staged = tmp_path / "staging" / "one"
    staged.write_bytes(b"secret")
    replace = Path.replace

    def within_disk(path: Path, target: Path) -> Path:
        if path.parent != target.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", within_disk)
    await contents.keep(staged, "file-1")
    kept = tmp_path / "files" / "file-1"
    assert (kept.read_bytes(), kept.stat().st_mode & 0o077) == (b"secret", 0)
    assert not staged.exists()
