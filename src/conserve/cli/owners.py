"""`conserve batch owners`: whose files and batches a store holds, for who runs its servers."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from msgspec.structs import asdict

from conserve.batch.errors import StoreUnavailableError
from conserve.batch.ids import EVERYBODY
from conserve.cli.batch_view import clock_time
from conserve.cli.failures import fail
from conserve.server.errors import BadInputError

# The database takes a second to import, which the help of no command is to wait for.
if TYPE_CHECKING:
    from conserve.batch.owner_store import Owner
    from conserve.batch.stores import Stores

T = TypeVar("T")

DIGEST = re.compile(r"[0-9a-f]{64}")
LEAST_CHARACTERS = 8

app = typer.Typer(
    name="owners",
    no_args_is_help=True,
    help="Whose files and batches a store holds; asks its database, not a server.",
)

DataDirOption = Annotated[
    Path,
    typer.Option(envvar="CONSERVE_BATCH_DATA_DIR", help="The folder that the server names first."),
]
OwnerArgument = Annotated[
    str, typer.Argument(metavar="OWNER", help="As `list` shows it; its beginning is enough.")
]


@app.command("list")
def list_owners(
    data_dir: DataDirOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Every owner, with what it has."""
    found = in_store(data_dir, _owners)
    if as_json:
        typer.echo(json.dumps([asdict(owner) for owner in found]))
        return
    for owner in found:
        typer.echo(f"{owner.tenant}  {_amounts(owner)}")


@app.command()
def move(
    owner: OwnerArgument,
    new_owner: Annotated[
        str, typer.Argument(metavar="NEW_OWNER", help="Another of them, or any key's digest.")
    ],
    data_dir: DataDirOption,
) -> None:
    """Give all files and batches of one owner to another."""

    async def work(stores: Stores) -> str:
        found = await _owners(stores)
        old, new = _named(owner, found), _new(new_owner, found)
        await stores.owners.move(old.tenant, new)
        return f"{_amounts(old)}: moved to {new}"

    typer.echo(in_store(data_dir, work))


@app.command()
def delete(
    owner: OwnerArgument,
    data_dir: DataDirOption,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete all files and batches of an owner, those that have not ended too."""

    async def look(stores: Stores) -> Owner:
        return _named(owner, await _owners(stores))

    async def work(stores: Stores) -> None:
        await stores.owners.delete(found.tenant)

    found = in_store(data_dir, look)
    if not yes:
        typer.confirm(f"Delete {_amounts(found)} of {found.tenant}?", abort=True)
    in_store(data_dir, work)
    typer.echo(f"{_amounts(found)}: deleted")


async def _owners(stores: Stores) -> list[Owner]:
    return await stores.owners.owners()


def _amounts(owner: Owner) -> str:
    parts = [
        f"{owner.num_live_batches:,} live batches",
        f"{owner.num_ended_batches:,} ended",
        f"{owner.num_files:,} files of {owner.num_bytes:,} bytes",
    ]
    if owner.last_batch_at is not None:
        parts.append(f"last batch {clock_time(owner.last_batch_at)}")
    return ", ".join(parts)


def _named(name: str, found: list[Owner]) -> Owner:
    """The owner that `name` begins; ends the command where it is not one."""
    fit = [owner for owner in found if owner.tenant == name]
    if not fit and len(name) >= LEAST_CHARACTERS:
        fit = [owner for owner in found if owner.tenant.startswith(name)]
    if len(fit) != 1:
        raise fail(
            f"{name!r} names {len(fit)} owners; give one of `conserve batch owners list`, or at "
            f"least the first {LEAST_CHARACTERS} characters of it"
        )
    return fit[0]


def _new(name: str, found: list[Owner]) -> str:
    return name if name == EVERYBODY or DIGEST.fullmatch(name) else _named(name, found).tenant


def in_store(data_dir: Path, work: Callable[[Stores], Awaitable[T]]) -> T:
    """What `work` comes to in the store of this folder; ends the command where there is none."""

    async def run() -> T:
        stores = _store(data_dir)
        try:
            await stores.prepare()
            return await work(stores)
        finally:
            await stores.close()

    try:
        return asyncio.run(run())
    except StoreUnavailableError as error:
        raise fail(error.for_log) from None


def _store(data_dir: Path) -> Stores:
    from conserve.batch.settings import BatchSettings
    from conserve.batch.stores import Stores
    from conserve.server.start.batch_data import settings_named

    try:
        with settings_named():
            settings = BatchSettings(data_dir=data_dir)
            if _is_missing(settings.resolved_database_url):
                raise fail(f"--data-dir: there is no batch store in {data_dir}")
            return Stores(settings, time.time)
    except BadInputError as error:
        raise fail(str(error)) from None


def _is_missing(database_url: str) -> bool:
    """Whether it is a file, and not there: nothing is made here."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(database_url)
    except ArgumentError:
        return False
    return url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file()
