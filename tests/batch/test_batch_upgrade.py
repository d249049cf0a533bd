"""A fleet that goes from one version to the next while it works: docs/fleet.md says how."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic import command
from sqlalchemy import text

from conserve.batch.database import Database, alembic_config
from conserve.batch.errors import StoreUnavailableError
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from tests.batch.batch_fakes import FakeClock

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parents[2] / "docs" / "fleet.md"
INDEXES = "SELECT indexname FROM pg_indexes WHERE tablename = 'lines'"
VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'ix_lines_leased'::regclass"


async def test_an_index_may_be_built_while_old_servers_work(
    tmp_path: Path, postgres_url: str
) -> None:
    """With the statement of the page, before the first new server starts."""
    found = re.search(r"^ +(CREATE INDEX CONCURRENTLY .*)$", PAGE.read_text(), re.MULTILINE)
    assert found is not None
    old = Database(postgres_url)

    def to_0004(connection: Any) -> None:
        command.upgrade(alembic_config(connection), "0004")

    async with old.write() as connection:
        await connection.run_sync(to_0004)
    await old.close()
    operator = await asyncpg.connect(postgres_url.replace("+asyncpg", ""))
    try:
        await operator.execute(found[1])
        new = Stores(BatchSettings(data_dir=tmp_path, database_url=postgres_url), FakeClock())
        await new.prepare()
        await new.close()
        names = {row["indexname"] for row in await operator.fetch(INDEXES)}
        assert "ix_lines_leased" in names
        assert "ix_lines_owner" not in names
        assert await operator.fetchval(VALID)
    finally:
        await operator.close()


async def test_an_old_server_says_that_it_cannot_start_on_newer_tables(stores: Stores) -> None:
    async with stores.database.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreUnavailableError, match=r"newer ConServe \(.*9999.*install that"):
        await stores.database.migrate()
