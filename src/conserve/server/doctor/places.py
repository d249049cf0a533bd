"""Where a server would keep and listen: each place is looked at, none is changed."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import fsspec
from alembic.script import ScriptDirectory
from pydantic import ValidationError
from pydantic_settings import SettingsError
from sqlalchemy import Connection, exc, inspect, make_url, text

from conserve.batch.database import MIGRATIONS, Database
from conserve.batch.drivers import check_database_driver, check_files_driver
from conserve.batch.errors import StoreUnavailableError
from conserve.batch.settings import BatchSettings
from conserve.server.doctor.finding import Finding
from conserve.server.errors import BadInputError
from conserve.server.start.address import check_address
from conserve.server.start.amounts import GIB, gib
from conserve.server.start.batch_data import DATA_DIR, default_data_dir
from conserve.server.start.default_model import NAME, cache_folder

SECTION = "places"
LITTLE_BYTES = GIB
FIX_ADDRESS = "Correct CONSERVE_BATCH_{}, or see docs/batches.md for what it may be."


def places(args: argparse.Namespace, environ: Mapping[str, str]) -> Iterator[Finding]:
    """args: `host`, `port`, `data_dir`, `model` and `served_model_name`, as given or None."""
    yield _port(args)
    given = args.data_dir or environ.get(DATA_DIR)
    name = args.served_model_name[0] if args.served_model_name else args.model or NAME
    folder = Path(given).expanduser() if given else default_data_dir(name)
    yield _folder("data folder", folder, "Name another with --data-dir, or give it to this user.")
    yield _folder("cache folder", cache_folder(), "Name another with XDG_CACHE_HOME.")
    try:
        settings = BatchSettings(data_dir=folder.absolute())
    except (ValidationError, SettingsError) as error:
        told = " ".join(str(error).split())
        yield Finding.problem(SECTION, "batches", told, "Correct the variable that is named.")
        return
    yield _database(settings)
    yield _files(settings)


def _port(args: argparse.Namespace) -> Finding:
    where = argparse.Namespace(host=args.host, port=args.port, uds=None, headless=False)
    try:
        check_address(where)
    except BadInputError as error:
        told, _, fix = str(error).partition(". ")
        fix += " Where it is ConServe that runs there, ask it with --url."
        return Finding.warning(SECTION, "port", told, fix)
    return Finding.ok(SECTION, "port", f"{args.port} is free")


def _folder(name: str, folder: Path, fix: str) -> Finding:
    """Whether it can be written, or made, and has room."""
    # Below a folder that may not be looked into nothing is there for os.path; Path.exists raises.
    there = next(each for each in (folder, *folder.absolute().parents) if os.path.exists(each))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding.problem(SECTION, name, f"{there} cannot be written", fix)
    free = shutil.disk_usage(there).free
    state = "" if there == folder else " (made at the first start)"
    told = f"{folder}{state}, {gib(free)} of disk free"
    if free < LITTLE_BYTES:
        return Finding.warning(SECTION, name, told, f"Free some disk, or: {fix}")
    return Finding.ok(SECTION, name, told)


def _database(settings: BatchSettings) -> Finding:
    url = settings.resolved_database_url
    fix = FIX_ADDRESS.format("DATABASE_URL")
    try:
        check_database_driver(url)
        parsed = make_url(url)
        file = Path(parsed.database or "")
        shown = parsed.render_as_string(hide_password=True)
        if parsed.get_backend_name() == "sqlite" and not os.path.exists(file):
            return Finding.ok(SECTION, "database", f"{shown}: made at the first start")
        return _revision(shown, asyncio.run(_revision_of(url)))
    except StoreUnavailableError as error:
        fix = "Start the database, or correct CONSERVE_BATCH_DATABASE_URL: host, user, password."
        cause = " ".join(str(error.__cause__ or error).split())
        return Finding.problem(SECTION, "database", f"does not answer: {cause}", fix)
    except ImportError as error:
        return _no_driver("database", error)
    except (exc.ArgumentError, ValueError) as error:
        return Finding.problem(SECTION, "database", str(error), fix)


def _no_driver(name: str, error: ImportError) -> Finding:
    """Ours say what to type behind a colon."""
    told, _, fix = str(error).partition(": ")
    return Finding.problem(SECTION, name, told, fix or told)


async def _revision_of(url: str) -> str:
    """Of its tables; empty where there are none yet."""
    database = Database(url)
    try:
        async with database.read() as connection:
            if not await connection.run_sync(_has_tables):
                return ""
            found = await connection.execute(text("SELECT version_num FROM alembic_version"))
            return str(found.scalar_one_or_none() or "")
    finally:
        await database.close()


def _has_tables(connection: Connection) -> bool:
    return inspect(connection).has_table("alembic_version")


def _revision(shown: str, revision: str) -> Finding:
    known = [each.revision for each in ScriptDirectory(str(MIGRATIONS)).walk_revisions()]
    if not revision:
        return Finding.ok(SECTION, "database", f"{shown}: answers, tables come at the first start")
    if revision == known[0]:
        return Finding.ok(SECTION, "database", f"{shown}: answers, revision {revision}")
    told = f"{shown}: answers, revision {revision}; this version has {known[0]}"
    if revision in known:
        fix = "Nothing, if that is meant: the first start of this version brings it up to date."
        return Finding.warning(SECTION, "database", told, fix)
    fix = "A newer ConServe made it: install that version, or name another database."
    return Finding.problem(SECTION, "database", told, fix)


def _files(settings: BatchSettings) -> Finding:
    url = settings.resolved_files_url
    try:
        check_files_driver(url)
        storage, root = fsspec.core.url_to_fs(url)
        there = bool(storage.exists(root))
    except ImportError as error:
        return _no_driver("files", error)
    except Exception as error:  # every driver raises its own
        told = " ".join(str(error).split()) or type(error).__name__
        fix = FIX_ADDRESS.format("FILES_URL")
        return Finding.problem(SECTION, "files", f"{url}: {told}", fix)
    return Finding.ok(SECTION, "files", f"{url}: {'answers' if there else 'made at first use'}")
