"""`conserve doctor [MODEL] [flags of conserve serve]`: what a report needs, what is wrong here."""

from __future__ import annotations

import json
import os
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from conserve.batch.printable import printable
from conserve.cli.output import Output, for_tables
from conserve.cli.remote import KeyOption
from conserve.server.doctor.finding import Finding, Level

MARKS = {
    Level.FACT: (" ", ""),
    Level.OK: ("✓", "green"),
    Level.WARNING: ("!", "yellow"),
    Level.PROBLEM: ("✗", "red"),
}


def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL] [FLAGS]", help="As for `conserve serve`; MODEL first."),
    ] = None,
    url: Annotated[str, typer.Option(help="Also ask the server that runs there.")] = "",
    api_key: KeyOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Say what a report needs: versions, machine, settings, places, model. No secrets."""
    from conserve.server.doctor.report import report  # brings the database, a second of import

    try:
        findings = report(arguments or [], os.environ, url, api_key)
    except ArgumentError as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in findings], indent=1))
    else:
        show(findings, for_tables())
    if any(each.level is Level.PROBLEM for each in findings):
        raise typer.Exit(1)


def show(findings: Sequence[Finding], console: Output) -> None:
    for section, found in groupby(findings, lambda each: each.section):
        console.print(Text(section, "bold"))
        console.print(_table(list(found)))
    console.print(_sum(findings))


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(width=1)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for each in findings:
        mark, style = MARKS[each.level]
        told = Text(printable(each.text))
        if each.fix:
            told.append(f"\n→ {printable(each.fix)}", style or "dim")
        table.add_row(Text(mark, style), printable(each.name), told)
    return table


def _sum(findings: Sequence[Finding]) -> Text:
    counts = [sum(each.level is level for each in findings) for level in Level]
    _, _, warnings, problems = counts
    style = "red" if problems else "yellow" if warnings else "green"
    return Text(f"{_many(problems, 'problem')}, {_many(warnings, 'warning')}", style)


def _many(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number or 'no'} {word}s"
