"""`conserve batch`: submit, watch and fetch batches on any OpenAI-compatible server."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from conserve.batch.printable import printable
from conserve.batch.rules import Rules
from conserve.batch.validation import validate
from conserve.batch.wire import ENDPOINTS
from conserve.cli.batch_view import counts, print_batch, print_batches
from conserve.cli.failures import fail, note
from conserve.cli.following import EveryOption, Looks, PatienceOption, follow
from conserve.cli.input_file import FileArgument, endpoint_for, endpoint_to_check, name_of, opened
from conserve.cli.output import written
from conserve.cli.owners import app as owners
from conserve.cli.remote import (
    CHUNK_BYTES,
    DEFAULT_URL,
    AwayError,
    KeyOption,
    Server,
    UrlOption,
    batch_path,
    server,
)

app = typer.Typer(
    name="batch", no_args_is_help=True, help="Batches on any OpenAI-compatible server."
)

app.add_typer(owners)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def _id(text: str) -> str:
    if not text.strip():
        raise typer.BadParameter("it is empty; `conserve batch list` shows the ids")
    return text


IdArgument = Annotated[str, typer.Argument(metavar="BATCH", callback=_id, help="Id of the batch.")]
EndpointOption = Annotated[
    str | None, typer.Option(help="The lines' url; read from the first line when left out.")
]


def show_batch(batch: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(batch))
        return
    print_batch(batch)


def end(batch: Any, as_json: bool) -> None:
    """Show an ended batch; exit status 1 unless it completed and something in it succeeded."""
    show_batch(batch, as_json)
    if batch["status"] != "completed":
        raise typer.Exit(1)
    if said := nothing_succeeded(batch):
        raise fail(said)


def nothing_succeeded(batch: Any) -> str:
    """What to say of a batch in which requests have failed and none has succeeded; else empty."""
    done, failed, _ = counts(batch)
    if done or not failed:
        return ""
    told = f"none of its {failed:,} requests succeeded"
    return f"{told}; see `conserve batch results {batch['id']} --errors`"


@app.command()
def submit(
    file: FileArgument,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    endpoint: EndpointOption = None,
    window: Annotated[str, typer.Option(help="Time the batch has, such as 24h or 30m.")] = "24h",
    deadline: Annotated[str | None, typer.Option(help="2h, or a time; ConServe only.")] = None,
    strict_deadline: Annotated[
        bool, typer.Option(help="Refuse a deadline that looks hopeless; ConServe only.")
    ] = False,
    priority: Annotated[int | None, typer.Option(help="1 is first; ConServe only.")] = None,
    wait: Annotated[bool, typer.Option(help="Stay until the batch has ended.")] = False,
    every_s: EveryOption = 1.0,
    patience_s: PatienceOption = 3600.0,
    as_json: JsonOption = False,
) -> None:
    """Upload a file and start a batch."""
    wishes: dict[str, Any] = {
        "completion_window": window,
        "deadline": deadline,
        "strict_deadline": strict_deadline or None,
        "priority": priority,
    }
    with server(url, api_key) as one, opened(file) as handle:
        wishes["endpoint"] = endpoint_for(file, handle, endpoint)
        upload = {"file": (name_of(file), handle, "application/jsonl")}
        made = one.call("POST", "files", files=upload, data={"purpose": "batch"})
        sent = {name: value for name, value in wishes.items() if value is not None}
        batch = _made(one, {"input_file_id": made["id"], **sent})
        if wait:
            # For whoever ends this command, or loses its terminal.
            way = f"`conserve batch watch {batch['id']}`"
            note(f"{batch['id']} goes on without this command, too; {way} comes back to it")
            looks = Looks(one, batch["id"], patience_s, heard_s=time.monotonic())
            end(follow(looks, every_s), as_json)
        else:
            show_batch(batch, as_json)


def _made(one: Server, body: dict[str, Any]) -> Any:
    """A new batch. Where the server refuses it, its file goes; where the answer is lost, the
    file stays, for the batch may be there."""
    try:
        return one.ask("POST", "batches", json=body)
    except AwayError as error:
        if not error.is_refusal:
            raise fail(f"{error}; see `conserve batch list` for whether it began") from None
        one.discard(body["input_file_id"])
        raise fail(str(error)) from None
    except typer.Exit:
        one.discard(body["input_file_id"])
        raise


@app.command("list")
def list_batches(
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    as_json: JsonOption = False,
) -> None:
    """The newest batches."""
    with server(url, api_key) as one:
        batches = one.call("GET", "batches", params={"limit": limit})["data"]
    if as_json:
        typer.echo(json.dumps(batches))
        return
    print_batches(batches)


@app.command()
def show(
    batch_id: IdArgument,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """One batch."""
    with server(url, api_key) as one:
        show_batch(one.batch(batch_id), as_json)


@app.command()
def watch(
    batch_id: IdArgument,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    every_s: EveryOption = 1.0,
    patience_s: PatienceOption = 3600.0,
    as_json: JsonOption = False,
) -> None:
    """Follow a batch to its end, with a progress bar."""
    with server(url, api_key) as one:
        end(follow(Looks(one, batch_id, patience_s), every_s), as_json)


def _told_to(verb: str) -> Callable[..., None]:
    def tell(
        batch_id: IdArgument,
        url: UrlOption = DEFAULT_URL,
        api_key: KeyOption = "",
        as_json: JsonOption = False,
    ) -> None:
        with server(url, api_key) as one:
            show_batch(one.call("POST", f"{batch_path(batch_id)}/{verb}"), as_json)

    return tell


for _verb, _help in (
    ("cancel", "Stop a batch; what it has done is kept."),
    (
        "pause",
        "Start no more requests of a batch until it is resumed; its deadline stays. ConServe only.",
    ),
    ("resume", "Go on with a paused batch. ConServe only."),
):
    app.command(_verb, help=_help)(_told_to(_verb))


@app.command()
def results(
    batch_id: IdArgument,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Here instead of standard output, which is -."),
    ] = None,
    errors: Annotated[bool, typer.Option(help="The error file instead.")] = False,
) -> None:
    """Fetch the output file of a batch that has ended."""
    kind = "error_file_id" if errors else "output_file_id"
    with server(url, api_key) as one:
        batch = one.batch(batch_id)
        if not batch.get(kind):
            raise fail(_why_nothing(batch, kind.removesuffix("_id")))
        if output is None or str(output) == "-":
            one.save(batch[kind], sys.stdout.buffer)
            return
        with written(output) as target:
            one.save(batch[kind], target)
    note(f"saved {output}")


def _why_nothing(batch: Any, kind: str) -> str:
    told = f"{batch['id']} is {batch['status']} and has no {kind}"
    more = nothing_succeeded(batch) if kind == "output_file" else ""
    return f"{told}: {more}" if more else told


@app.command("validate")
def validate_file(
    file: FileArgument, endpoint: EndpointOption = None, as_json: JsonOption = False
) -> None:
    """Check a file as the server would, without one; models are not known here."""
    with opened(file) as handle:
        where = endpoint_to_check(file, handle, endpoint)
        if where not in ENDPOINTS:
            raise fail(f"{where} is no batch endpoint; there are {', '.join(ENDPOINTS)}")
        found = validate(iter(lambda: handle.read(CHUNK_BYTES), b""), Rules(endpoint=where))
    if as_json:
        errors = [error.model_dump() for error in found.errors]
        typer.echo(json.dumps({"requests": found.num_lines, "errors": errors}))
    else:
        for error in found.errors:
            typer.echo(printable(f"{file}:{error.line or 1}: {error.code}: {error.message}"))
        typer.echo(f"{found.num_lines} requests, {found.num_errors} errors")
    if found.errors:
        raise typer.Exit(1)
