"""What an address needs that is not installed, or names wrongly, is said with the fix."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from conserve.batch import drivers
from conserve.batch.errors import BatchSettingsError
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores


def refusal(folder: Path, **settings: str) -> str:
    with pytest.raises(BatchSettingsError) as refused:
        Stores(BatchSettings.model_validate({"data_dir": folder, **settings}), time.time)
    return str(refused.value)


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_an_address_of_postgresql_begins_in_one_way(tmp_path: Path, scheme: str) -> None:
    told = refusal(tmp_path, database_url=f"{scheme}://user:secret@host/name")
    assert told == (
        "database_url cannot be used: an address of PostgreSQL begins with postgresql+asyncpg://"
    )


@pytest.mark.parametrize(
    ("setting", "address", "package", "extra"),
    [
        ("database_url", "postgresql+asyncpg://user:secret@host/name", "asyncpg", "postgres"),
        ("files_url", "s3://bucket/folder", "s3fs", "s3"),
    ],
)
def test_a_missing_driver_is_named_with_its_extra(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    address: str,
    package: str,
    extra: str,
) -> None:
    monkeypatch.setattr(drivers, "find_spec", lambda name: None if name == package else object())
    told = refusal(tmp_path, **{setting: address})
    assert told.startswith(f"{setting} cannot be used: ")
    assert told.endswith(f"needs the package {package}: pip install 'conserve-llm[{extra}]'")
