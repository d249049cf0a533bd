"""Databases, settings and the fake model for the tests of the batch room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from tests.batch.batch_fakes import FakeClock
from tests.batch.batch_postgres import Postgres, binary


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    if binary("initdb") is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    server = Postgres("fsync=off")
    yield server
    server.close()


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    """A fresh, empty database."""
    name = f"test_{uuid4().hex}"
    asyncio.run(_create(postgres.dsn("postgres"), name))
    return postgres.url(name)


async def _create(dsn: str, name: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each database in turn: what holds for one must hold for the other."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/contract.db"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def shared(tmp_path: Path, postgres_url: str, clock: FakeClock) -> AsyncIterator[Stores]:
    """Stores on a PostgreSQL that several workers may share."""
    made = Stores(BatchSettings(data_dir=tmp_path, database_url=postgres_url), clock)
    await made.prepare()
    yield made
    await made.close()


@pytest.fixture
def settings(tmp_path: Path) -> BatchSettings:
    return BatchSettings(data_dir=tmp_path / "data", poll_s=0.05)


@pytest.fixture
def store_limits() -> dict[str, Any]:
    """Settings of `stores` that a module wants otherwise."""
    return {}


@pytest.fixture
async def stores(
    tmp_path: Path, database_url: str, clock: FakeClock, store_limits: dict[str, Any]
) -> AsyncIterator[Stores]:
    """A store on its own, that no service runs on."""
    settings = BatchSettings(data_dir=tmp_path, database_url=database_url, **store_limits)
    made = Stores(settings, clock)
    await made.prepare()
    yield made
    await made.close()
