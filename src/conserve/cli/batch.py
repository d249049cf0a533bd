"""`conserve batch`: submit, watch and fetch batches on any OpenAI-compatible server."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from conserve.batch.lifecycle import TERMINAL
from conserve.batch.rules import Rules
from conserve.batch.validation import validate
from conserve.batch.wire import ENDPOINTS
from conserve.cli.batch_view import (
    counts,
    print_batch,
    print_batches,
    progress_bar,
    progress_note,
)
from conserve.cli.failures import fail, notes
from conserve.cli.remote import CHUNK_BYTES, DEFAULT_URL, KeyOption, Server, UrlOption, server

app = typer.Typer(
    name="batch", no_args_is_help=True, help="Batches on any OpenAI-compatible server."
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
IdArgument = Annotated[str, typer.Argument(metavar="BATCH", help="Id of the batch.")]
FileArgument = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="One request a line (JSONL).")
]
EndpointOption = Annotated[
    str | None, typer.Option(help="The lines' url; read from the first line when left out.")
]


def show_batch(batch: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(batch))
        return
    print_batch(batch)


def follow(one: Server, batch_id: str, every_s: float) -> Any:
    """The batch at its end; progress is shown meanwhile on a terminal."""
    with progress_bar(notes) as progress:
        task = progress.add_task("waiting", total=None, note="")
        while (batch := one.batch(batch_id))["status"] not in TERMINAL:
            done, failed, total = counts(batch)
            progress.update(
                task,
                description=batch["status"],
                completed=done + failed,
                total=total or None,
                note=progress_note(batch),
            )
            time.sleep(every_s)
    return batch


def end(batch: Any, as_json: bool) -> None:
    """Show an ended batch; exit status 1 unless it completed."""
    show_batch(batch, as_json)
    if batch["status"] != "completed":
        raise typer.Exit(1)


def endpoint_of(file: Path) -> str:
    with file.open("rb") as handle:
        first = handle.readline(CHUNK_BYTES * 256)
    try:
        return str(json.loads(first)["url"])
    except (ValueError, KeyError, TypeError):
        raise fail(f"{file}: the first line names no url; see `conserve batch validate`") from None


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
    every_s: Annotated[float, typer.Option(min=0.01, help="Seconds between looks.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Upload a file and start a batch."""
    body: dict[str, Any] = {
        "endpoint": endpoint or endpoint_of(file),
        "completion_window": window,
        "deadline": deadline,
        "strict_deadline": strict_deadline or None,
        "priority": priority,
    }
    with server(url, api_key) as one, file.open("rb") as handle:
        upload = {"file": (file.name, handle, "application/jsonl")}
        made = one.call("POST", "files", files=upload, data={"purpose": "batch"})
        sent = {name: value for name, value in body.items() if value is not None}
        batch = one.call("POST", "batches", json={"input_file_id": made["id"], **sent})
        if wait:
            end(follow(one, batch["id"], every_s), as_json)
        else:
            show_batch(batch, as_json)


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
    every_s: Annotated[float, typer.Option(min=0.01, help="Seconds between looks.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Follow a batch to its end, with a progress bar."""
    with server(url, api_key) as one:
        end(follow(one, batch_id, every_s), as_json)


@app.command()
def cancel(
    batch_id: IdArgument,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Stop a batch; what it has done is kept."""
    with server(url, api_key) as one:
        show_batch(one.call("POST", f"batches/{batch_id}/cancel"), as_json)


@app.command()
def results(
    batch_id: IdArgument,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Here instead of standard output.")
    ] = None,
    errors: Annotated[bool, typer.Option(help="The error file instead.")] = False,
) -> None:
    """Fetch the output file of a batch that has ended."""
    kind = "error_file_id" if errors else "output_file_id"
    with server(url, api_key) as one:
        batch = one.batch(batch_id)
        if not batch.get(kind):
            raise fail(f"{batch_id} is {batch['status']} and has no {kind.removesuffix('_id')}")
        if output is None:
            one.save(batch[kind], sys.stdout.buffer)
            return
        # A download that breaks off leaves what was there before.
        part = output.with_name(f"{output.name}.part")
        try:
            with part.open("wb") as target:
                one.save(batch[kind], target)
            part.replace(output)
        finally:
            part.unlink(missing_ok=True)
    notes.print(f"saved {output}", markup=False)


@app.command("validate")
def validate_file(
    file: FileArgument, endpoint: EndpointOption = None, as_json: JsonOption = False
) -> None:
    """Check a file as the server would, without one; models are not known here."""
    where = endpoint or endpoint_of(file)
    if where not in ENDPOINTS:
        raise fail(f"{where} is no batch endpoint; there are {', '.join(ENDPOINTS)}")
    with file.open("rb") as handle:
        found = validate(iter(lambda: handle.read(CHUNK_BYTES), b""), Rules(endpoint=where))
    if as_json:
        errors = [error.model_dump() for error in found.errors]
        typer.echo(json.dumps({"requests": found.num_lines, "errors": errors}))
    else:
        for error in found.errors:
            typer.echo(f"{file}:{error.line or 1}: {error.code}: {error.message}")
        typer.echo(f"{found.num_lines} requests, {found.num_errors} errors")
    if found.errors:
        raise typer.Exit(1)
