"""What an address needs that is not installed, or names wrongly, is said with the fix."""

from __future__ import annotations

import inspect
import re
import time
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from conserve.batch import drivers
from conserve.batch.drivers import check_database_driver
from conserve.batch.errors import BatchSettingsError, StoreUnavailableError
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from tests.batch.batch_fakes import eventually, running

pytestmark = pytest.mark.anyio

SQLALCHEMYS = ("prepared_statement_cache_size",)


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
    ("address", "reason"),
    [
        ("postgresql+asyncpg://h/n?sslmode=require", "calls sslmode ssl: write ssl=require"),
        ("postgresql+asyncpg://h/n?ssl=true", "ssl must be one of disable, .*, not 'true'"),
        ("postgresql+asyncpg://h/n?application_name=x", "has no option 'application_name'"),
        ("postgresql+asyncpg://h/n?statement_cache_size=0", "has no option 'statement_cache_size'"),
        ("sqlite:////srv/batches.db", "an address of SQLite is sqlite.aiosqlite:///FILE"),
        ("sqlite+aiosqlite://", "an address of SQLite is sqlite.aiosqlite:///FILE"),
        ("mysql+aiomysql://h/n", "must be of PostgreSQL .* or SQLite"),
    ],
)
def test_an_address_that_can_never_work_is_refused_at_once(
    tmp_path: Path, address: str, reason: str
) -> None:
    told = refusal(tmp_path, database_url=address)
    assert re.match(f"database_url cannot be used: .*{reason}", told), told


@pytest.mark.parametrize(
    "options",
    [
        "",
        "?ssl=verify-full",
        "?host=a:5432&host=b:5432&target_session_attrs=read-write",
        "?prepared_statement_cache_size=0&command_timeout=5",
    ],
)
def test_what_asyncpg_takes_passes(options: str) -> None:
    check_database_driver(f"postgresql+asyncpg://user@/name{options}")
    dialect = make_url(f"postgresql+asyncpg://user@/name{options}")
    _, taken = dialect.get_dialect()().create_connect_args(dialect)
    inspect.signature(asyncpg.connect).bind_partial(
        **{name: value for name, value in taken.items() if name not in SQLALCHEMYS}
    )


async def test_the_log_says_why_a_database_does_not_answer(
    tmp_path: Path, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And a client is not told: it may name hosts and users."""
    url = make_url(postgres_url).set(database="nobody_made_it")
    settings = BatchSettings(
        data_dir=tmp_path, database_url=url.render_as_string(hide_password=False), poll_s=0.05
    )
    async with running(settings) as run:
        await eventually(lambda: "nobody_made_it" in caplog.text)
        answer = await run.http.get("/v1/batches")
    assert answer.status_code == 503
    assert "nobody_made_it" not in answer.text


def test_the_log_has_nothing_of_what_people_send() -> None:
    error = StoreUnavailableError("The database does not answer.")
    error.__cause__ = DBAPIError("INSERT", {"metadata": "private"}, OSError("it hung up"))
    assert error.for_log == "The database does not answer. (OSError: it hung up)"


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
