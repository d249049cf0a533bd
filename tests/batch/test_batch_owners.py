"""What a removed key owns: it runs to its end, and an operator lists, moves and deletes it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from hashlib import sha256
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner, Result

from conserve.batch.ids import EVERYBODY, tenant_of
from conserve.batch.lifecycle import Status
from conserve.batch.overview import overview
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.cli.batch import app
from conserve.cli.main import app as commands
from tests.batch.batch_fakes import FakeClock, FakeModel, eventually, running
from tests.batch.builders import numbered, stored_batch, stored_file

pytestmark = pytest.mark.anyio

OLD, NEW = tenant_of("Bearer old"), tenant_of("Bearer new")


async def test_owners_are_listed_and_moved(stores: Stores, clock: FakeClock) -> None:
    file = await stored_file(stores, numbered(3), OLD)
    batch = await stored_batch(stores, file, "key")
    theirs = await stored_batch(stores, await stored_file(stores, numbered(3), NEW), "key")
    before, after = await stores.owners.owners()
    assert {before.tenant, after.tenant} == {OLD, NEW}
    assert (before.num_live_batches, before.num_ended_batches, before.num_files) == (1, 0, 1)
    assert (before.num_bytes, before.last_batch_at) == (file.bytes, clock())
    await stores.owners.move(OLD, NEW)
    (one,) = await stores.owners.owners()
    assert (one.tenant, one.num_live_batches, one.num_files) == (NEW, 2, 2)
    assert (await stores.batches.get(NEW, batch.id)).idempotency_key is None
    assert (await stores.batches.get(NEW, theirs.id)).idempotency_key == "key"
    assert await stores.files.get(NEW, file.id)


async def test_a_batch_that_runs_is_moved_with_what_it_makes(tmp_path: Path) -> None:
    settings = BatchSettings(data_dir=tmp_path, poll_s=0.05)
    model = FakeModel(api_keys=["old", "new"])
    model.open.clear()
    async with running(settings, model) as run:
        batch = await run.submit(numbered(3))
        await eventually(lambda: model.running == 3)
        await run.service.stores.owners.move(OLD, NEW)
        with pytest.raises(openai.NotFoundError):
            await run.client.batches.retrieve(batch.id)
        model.open.set()
        run.client = run.client_of("new")
        batch = await run.until(batch.id, "completed")
        assert len(await run.lines_of(batch.output_file_id)) == 3


async def test_a_batch_that_runs_is_deleted(tmp_path: Path, database_url: str) -> None:
    settings = BatchSettings(data_dir=tmp_path, poll_s=0.05, database_url=database_url)
    model = FakeModel(api_keys=["old", "new"])
    async with running(settings, model) as run:
        stores = run.service.stores
        await run.until((await run.submit(numbered(2))).id, "completed")
        model.open.clear()
        batch = await run.submit(numbered(3))
        await eventually(lambda: model.running == 3)
        await stores.owners.delete(OLD)
        assert await stores.owners.owners() == []
        assert os.listdir(tmp_path / "files") == []
        await eventually(lambda: model.running == 0)  # its lines are stopped
        model.open.set()
        with pytest.raises(openai.NotFoundError):
            await run.client.batches.retrieve(batch.id)
        # Others go on, and what was counted stays counted.
        run.client = run.client_of("new")
        batch = await run.until((await run.submit(numbered(4))).id, "completed")
        seen = await overview(stores, time.time())
        assert (seen.statuses, seen.completed) == ({Status.COMPLETED: 1}, 2 + 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with one batch of the old key's."""

    async def fill() -> None:
        made = Stores(BatchSettings(data_dir=tmp_path / "data"), time.time)
        await made.prepare()
        await stored_batch(made, await stored_file(made, numbered(2), OLD))
        await made.close()

    asyncio.run(fill())
    return tmp_path / "data"


def owners(*words: str, folder: Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["owners", *words, "--data-dir", str(folder)])
    assert result.exit_code == code, result.output
    return result


def test_the_digest_of_a_key_is_what_the_documentation_says() -> None:
    assert sha256(b"old").hexdigest() == OLD


def test_owners_list(folder: Path) -> None:
    assert OLD in owners("list", folder=folder).output
    (found,) = json.loads(owners("list", "--json", folder=folder).output)
    assert (found["tenant"], found["num_live_batches"], found["num_files"]) == (OLD, 1, 1)


def test_owners_move(folder: Path) -> None:
    assert f"moved to {NEW}" in owners("move", OLD[:8], NEW, folder=folder).output
    owners("move", NEW[:12], EVERYBODY, folder=folder)
    (found,) = json.loads(owners("list", "--json", folder=folder).output)
    assert found["tenant"] == EVERYBODY


def test_owners_delete(folder: Path) -> None:
    result = CliRunner().invoke(
        app, ["owners", "delete", OLD, "--data-dir", str(folder)], input="n\n"
    )
    assert result.exit_code == 1
    assert "1 live batches" in owners("delete", OLD, "--yes", folder=folder).output
    assert owners("list", folder=folder).output == ""


@pytest.mark.parametrize("name", ["deadbeef", OLD[:7], ""])
def test_a_name_that_is_none(folder: Path, name: str) -> None:
    assert "owners list" in owners("delete", name, "--yes", folder=folder, code=1).output


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "nonsense"),
        ("LEASE_S", "abc"),
        ("REQUEST_HEADERS", "{"),
        ("OWNER_LIMITS", "/no/such/file"),
    ],
)
@pytest.mark.parametrize("words", [["batch", "owners", "list"], ["usage"]], ids=" ".join)
def test_a_setting_that_cannot_be_is_named(
    words: list[str], name: str, value: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"CONSERVE_BATCH_{name}", value)
    result = CliRunner().invoke(commands, [*words, "--data-dir", str(folder)])
    assert (result.exit_code, result.stdout) == (1, "")
    known_as = "--owner-limits" if name == "OWNER_LIMITS" else f"CONSERVE_BATCH_{name}"
    assert result.stderr.startswith(f"error: {known_as}")


def test_a_database_that_cannot_be_read_is_told_with_its_cause(folder: Path) -> None:
    (folder / "batches.db").write_bytes(b"no database" * 1000)
    for words in (["batch", "owners", "list"], ["usage"]):
        result = CliRunner().invoke(commands, [*words, "--data-dir", str(folder)])
        assert result.exit_code == 1
        assert "file is not a database" in result.stderr


def test_a_folder_without_a_store(tmp_path: Path) -> None:
    said = owners("list", folder=tmp_path / "nothing", code=1).output
    assert "no batch store" in said
    assert not (tmp_path / "nothing").exists()
