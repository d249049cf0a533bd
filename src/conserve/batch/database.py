"""One database, SQLite or PostgreSQL, seen as read and write transactions."""

from __future__ import annotations

import asyncio
import fcntl
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from glob import escape, glob
from pathlib import Path
from threading import Thread
from typing import Any
from weakref import WeakSet

import aiosqlite
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Table, event, exc, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from conserve.batch.errors import StoreUnavailableError
from conserve.batch.private import make_file

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_TIMEOUT_S = 10
SURELY_THERE_S = 5.0
STATEMENT_TIMEOUT_S = 60.0
# A statement of a migration may read millions of rows; what is cut off would begin anew for ever.
MIGRATION_TIMEOUT_S = 3600.0
LOCK_TIMEOUT_S = 60
# Any constant serves: it only has to be the same in every server that migrates.
MIGRATION_LOCK = 0x636F6E73
CALLERS_FAULT = (exc.IntegrityError, exc.ProgrammingError, exc.DataError, exc.NotSupportedError)
BEING_RESTORED = ("42P01", "3F000", "42501")
"""PostgreSQL's words for a table, a schema or a privilege that is not there: it will be."""


class Database:
    """Raises StoreUnavailableError wherever the database does not answer; never blocks for ever.

    A transaction does database work only: a file error raised inside one would be taken for the
    database's. What people sent is in no error: errors are logged.
    """

    def __init__(self, url: str) -> None:
        self.is_sqlite = make_url(url).get_backend_name() == "sqlite"
        self._url = url
        self._file = make_url(url).database or ""
        self._threads = WeakSet[Thread]()
        self._engine = (
            _sqlite_engine(url, self._threads)
            if self.is_sqlite
            else _postgres_engine(url, STATEMENT_TIMEOUT_S)
        )
        self._writer = self._engine.execution_options(conserve_write=True)
        self._reader = self._engine
        if not self.is_sqlite:
            # Its transactions show each statement what is committed by then, so that a transaction
            # of reads would show no more than the statements do, and cost two more of them.
            self._reader = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Statements that change nothing; on SQLite they see one state of the database."""
        async with _named_errors(), self._reader.begin() as connection:
            yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that commits at the end, or leaves no trace when the block raises."""
        async with _named_errors(), self._writer.begin() as connection:
            yield connection

    async def queue_up(self, connection: AsyncConnection, name: str) -> None:
        """Let no other transaction past its own call with this name until this one ends. SQLite has
        one writer at a time anyway."""
        if not self.is_sqlite:
            query = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")
            await connection.execute(query, {"name": name})

    def insert(self, table: Table) -> postgresql.Insert | sqlite.Insert:
        """An insert that knows `on_conflict_do_nothing`."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    async def migrate(self) -> None:
        """Bring the tables up to date; safe when many servers do it at once."""
        if not self.is_sqlite:
            await self._migrate_postgres()
            return
        async with _named_errors():
            await asyncio.to_thread(_turn_to_wal, self._file)
        async with self.write() as connection:
            await connection.run_sync(_upgrade)

    async def _migrate_postgres(self) -> None:
        engine = _postgres_engine(self._url, MIGRATION_TIMEOUT_S)
        try:
            async with _named_errors(), engine.begin() as connection:
                await connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'"))
                await connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
                await connection.run_sync(_upgrade)
        finally:
            await engine.dispose()

    async def close(self) -> None:
        """Returns when nothing of it runs any more. A connection that was given up within a query
        ends after it, and tells the event loop, which must be there still."""
        await self._engine.dispose()
        for thread in [each for each in self._threads if each.is_alive()]:
            await asyncio.to_thread(thread.join, BUSY_TIMEOUT_S)


def alembic_config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _upgrade(connection: Connection) -> None:
    try:
        command.upgrade(alembic_config(connection), "head")
    except CommandError as error:
        raise StoreUnavailableError(
            f"The batch database has tables of a newer ConServe ({error}): install that version "
            "here too, or name another database."
        ) from error


@asynccontextmanager
async def _named_errors() -> AsyncIterator[None]:
    try:
        yield
    except CALLERS_FAULT as error:
        if getattr(error.orig, "sqlstate", None) in BEING_RESTORED:
            raise StoreUnavailableError("The batch database does not answer; try again.") from error
        raise
    except (exc.DBAPIError, exc.TimeoutError, sqlite3.Error, OSError) as error:
        raise StoreUnavailableError("The batch database does not answer; try again.") from error
    except Exception as error:
        # asyncpg raises its own classes while a connection is being made.
        if type(error).__module__.partition(".")[0] == "asyncpg":
            raise StoreUnavailableError("The batch database does not answer; try again.") from error
        raise


def _turn_to_wal(file: str) -> None:
    """Set the file's journal mode, which stays with it; its journals get the file's own mode.

    Under a lock of its own: two connections that turn a new file at once wait for each other.
    """
    for each in (file, f"{file}.lock", *glob(f"{escape(file)}-*")):
        make_file(Path(each))
    with open(f"{file}.lock", "w") as lock, closing(sqlite3.connect(file)) as connection:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection.execute("PRAGMA journal_mode=WAL")


def _postgres_engine(url: str, statement_timeout_s: float) -> AsyncEngine:
    """The connection that was used last is used next, so that there are few that wait for long.

    The isolation is what the stores' locks are made for, whatever the database has for others: a
    statement after one that waited for a lock sees what was committed meanwhile.
    """
    engine = create_async_engine(
        url,
        hide_parameters=True,
        isolation_level="READ COMMITTED",
        pool_use_lifo=True,
        pool_timeout=BUSY_TIMEOUT_S,
        connect_args={"timeout": BUSY_TIMEOUT_S, "command_timeout": statement_timeout_s},
    )

    @event.listens_for(engine.sync_engine, "checkin")
    def put_back(_connection: Any, record: Any) -> None:
        record.info["used_at_s"] = time.monotonic()

    @event.listens_for(engine.sync_engine, "checkout")
    def take(connection: Any, record: Any, _proxy: Any) -> None:
        """Ask one that was put back a while ago whether it is there: the server may have been
        started anew since. To ask each time would triple the statements of a short read."""
        used_at_s = record.info.get("used_at_s", time.monotonic())
        if time.monotonic() < used_at_s + SURELY_THERE_S:
            return
        try:
            connection.ping()
        except Exception as error:
            raise exc.InvalidatePoolError from error  # the others are gone, too

    return engine


def _sqlite_engine(url: str, threads: WeakSet[Thread]) -> AsyncEngine:
    """`threads` is where the connections' are put: aiosqlite has one for each."""
    engine = create_async_engine(
        url,
        hide_parameters=True,
        pool_timeout=BUSY_TIMEOUT_S,
        connect_args={"timeout": BUSY_TIMEOUT_S},
    )

    def open_one(*arguments: Any, **options: Any) -> aiosqlite.Connection:
        connection = aiosqlite.connect(*arguments, **options)
        connection._thread.daemon = True  # as SQLAlchemy has it
        threads.add(connection._thread)
        return connection

    @event.listens_for(engine.sync_engine, "do_connect")
    def connect(_dialect: Any, _record: Any, _arguments: Any, options: dict[str, Any]) -> None:
        options["async_creator_fn"] = open_one

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours, below
        cursor = connection.cursor()
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine.sync_engine, "invalidate")
    def roll_back(connection: Any, _record: Any, _error: Any) -> None:
        # A task cancelled within a query leaves a cursor, and SQLite keeps a closed connection, and
        # with it the write lock, for as long as there is one.
        with suppress(exc.DBAPIError, sqlite3.Error):
            connection.rollback()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # A reader that turns writer half way is refused at once (SQLITE_BUSY), so writers say so.
        write = connection.get_execution_options().get("conserve_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine
