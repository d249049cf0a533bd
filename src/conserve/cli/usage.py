"""`conserve usage`: what requests came to by day, class and model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from conserve.batch.wire import RequestClass
from conserve.cli.batch_view import plain
from conserve.cli.output import print_table
from conserve.cli.owners import in_store
from conserve.cli.remote import DEFAULT_URL, KeyOption, UrlOption, server

if TYPE_CHECKING:
    from conserve.batch.stores import Stores

TOKENS = ("tokens in", "cached", "tokens out")


def usage(
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    days: Annotated[int, typer.Option(min=1, max=3660, help="How many, with today.")] = 31,
    request_class: Annotated[
        RequestClass | None, typer.Option("--class", help="This class alone.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Ask the store of this folder, for all owners, and no server."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """What a key's requests, or all owners', came to by day of UTC, class and model."""
    if data_dir is not None:
        found = _of_all(data_dir, days, request_class)
    else:
        wishes = {"days": days, **({"request_class": request_class} if request_class else {})}
        with server(url, api_key) as one:
            found = one.call("GET", "usage", params=wishes)["data"]
    if as_json:
        typer.echo(json.dumps(found))
        return
    print_usage(found)


def _of_all(data_dir: Path, days: int, request_class: RequestClass | None) -> list[dict[str, Any]]:
    """As a server tells it of one owner, with `owner`."""
    from conserve.batch.describe import usage_day

    async def work(stores: Stores) -> list[dict[str, Any]]:
        today = stores.usage.today
        found = await stores.usage.days(today - days + 1, today, None, request_class)
        return [{"owner": day.billed.tenant, **usage_day(day).model_dump()} for day in found]

    return in_store(data_dir, work)


def print_usage(days: Sequence[Any]) -> None:
    """With models in lines of 14 letters where the terminal has no room for more."""
    told = plain(days)
    print_table(*(_usage_table(told, model_width) for model_width in (None, 14)))


def _usage_table(days: Sequence[Any], model_width: int | None) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    with_owner = any("owner" in day for day in days)
    for heading in ("day", *(("owner",) if with_owner else ()), "class"):
        table.add_column(heading, no_wrap=True)
    table.add_column("model", overflow="fold", max_width=model_width)
    for heading in ("done", "failed", *TOKENS):
        table.add_column(heading, justify="right", no_wrap=True)
    for day in days:
        used = day["usage"]
        cached = used["input_tokens_details"]["cached_tokens"]
        tokens = used["input_tokens"], cached, used["output_tokens"]
        numbers = (f"{number:,}" for number in (day["completed"], day["failed"], *tokens))
        owner = (day["owner"][:16],) if with_owner else ()
        words = (day["date"], *owner, day["request_class"], day["model"] or "-")
        table.add_row(*words, *numbers)
    return table
