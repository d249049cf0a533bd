"""The folder that `conserve serve` keeps everything in, and what else may lie there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conserve.batch.settings import BatchSettings
from conserve.server.errors import BadInputError
from conserve.server.start.batch_data import DATA_DIR, KEPT, settle_data_dir
from tests.batch.batch_fakes import running
from tests.batch.builders import numbered


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_DIR, raising=False)


def forbid(name: str, patch: pytest.MonkeyPatch) -> None:
    """Let nobody write what has this name: root may, and the tests may be root's."""
    patch.setattr(os, "access", lambda path, _mode: Path(path).name != name)


def test_the_root_of_a_disk_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ext4 puts a folder there that is root's."""
    (tmp_path / "lost+found").mkdir()
    forbid("lost+found", monkeypatch)
    assert settle_data_dir(str(tmp_path), "m") == tmp_path


@pytest.mark.parametrize("name", ["batches.db", "batches.db-wal", "files", "staging", "workers"])
def test_what_a_server_keeps_there_must_be_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).touch()
    forbid(name, monkeypatch)
    with pytest.raises(BadInputError, match=f"{name} cannot be written: Permission denied"):
        settle_data_dir(str(tmp_path), "m")


def test_the_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(tmp_path.name, monkeypatch)
    with pytest.raises(BadInputError, match=f"{tmp_path} cannot be written: Permission denied"):
        settle_data_dir(str(tmp_path), "m")


@pytest.mark.anyio
async def test_a_server_keeps_nothing_else_there(settings: BatchSettings) -> None:
    async with running(settings) as run:
        batch = await run.submit(numbered(2))
        await run.until(batch.id, "completed")
        found = {path.name for path in settings.data_dir.iterdir()}
        known = {path.name for name in KEPT for path in settings.data_dir.glob(name)}
    assert found == known
    assert {"batches.db", "files", "staging", "workers"} <= found
