"""How batches look in a terminal; piped elsewhere, the same words without colour."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from conserve.batch.lifecycle import TERMINAL
from conserve.batch.printable import printable
from conserve.cli.output import Output, print_table

COLOURS = {
    "completed": "green",
    "failed": "red",
    "expired": "red",
    "cancelling": "yellow",
    "cancelled": "yellow",
}
ENDS = tuple(f"{status}_at" for status in sorted(TERMINAL))


def print_batch(batch: Any) -> None:
    """Id and status, then what is known of it, then what was wrong with its file."""
    console, batch = Output(highlight=False, soft_wrap=True), plain(batch)
    console.print(Text(batch["id"], "bold"))
    for name, value in _rows(batch):
        style = _colour(batch["status"]) if name == "status" else ""
        console.print(Text.assemble("  ", (f"{name:<9}", "dim"), " ", (value, style)))
    for error in (batch.get("errors") or {}).get("data") or []:
        where = f"line {error['line']}: " if error.get("line") else ""
        console.print(Text.assemble("  ", (f"{where}{error['code']}", "red"), ": "), end="")
        console.print(Text(error["message"]))


def _rows(batch: Any) -> Iterator[tuple[str, str]]:
    yield "status", batch["status"]
    yield "requests", _requests(batch)
    for name in ("endpoint", "model"):
        if batch.get(name):
            yield name, batch[name]
    if batch.get("tokens_per_second") is not None:
        yield "speed", _speed(batch)
    if batch.get("created_at"):
        yield "created", clock_time(batch["created_at"])
    if batch.get("paused_at"):
        yield "paused", clock_time(batch["paused_at"])
    if batch.get("expires_at"):
        state = batch.get("deadline_state")
        told = f" ({state.replace('_', ' ')})" if state and state != "unknown" else ""
        yield "due", clock_time(batch["expires_at"]) + told
    if batch.get("estimated_finish_at"):
        yield "estimate", clock_time(batch["estimated_finish_at"])
    for moment in filter(None, map(batch.get, ENDS)):
        yield "ended", clock_time(moment)
    for name in ("input", "output", "error"):
        if batch.get(f"{name}_file_id"):
            yield f"{name}s" if name == "error" else name, batch[f"{name}_file_id"]


def _requests(batch: Any) -> str:
    done, failed, total = counts(batch)
    if not total:
        return "not counted yet" if batch["status"] == "validating" else "none has run"
    return f"{done:,} of {total:,} done, {failed:,} failed"


def counts(batch: Any) -> tuple[int, int, int]:
    """Completed, failed and total requests."""
    told = batch.get("request_counts") or {}
    return told.get("completed") or 0, told.get("failed") or 0, told.get("total") or 0


def _speed(batch: Any) -> str:
    return f"{batch['tokens_per_second']:,.0f} tokens/s"


def _colour(status: str) -> str:
    return COLOURS.get(status, "cyan")


def clock_time(moment: float) -> str:
    """By this machine's clock; a time that no calendar has as it is."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    except (ValueError, OverflowError, OSError):
        return str(moment)


def print_batches(batches: Sequence[Any]) -> None:
    """Without their times where the terminal has no room for them."""
    told = plain(batches)
    print_table(*(_batches_table(told, with_times=wanted) for wanted in (True, False)))


def _batches_table(batches: Sequence[Any], *, with_times: bool) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("batch", "status"):
        table.add_column(heading, no_wrap=True)
    for heading in ("done", "failed", "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    if with_times:
        table.add_column("created", no_wrap=True)
    for batch in batches:
        numbers = [f"{number:,}" for number in counts(batch)]
        status = Text(batch["status"], _colour(batch["status"]))
        made = batch.get("created_at")
        times = [clock_time(made) if made else "-"] if with_times else []
        table.add_row(Text(batch["id"]), status, *numbers, *times)
    return table


def plain(told: Any) -> Any:
    """What a server tells, with all its texts printable."""
    if isinstance(told, str):
        return printable(told)
    if isinstance(told, dict):
        return {name: plain(value) for name, value in told.items()}
    return [plain(value) for value in told] if isinstance(told, list) else told


def progress_bar(console: Console) -> Progress:
    """A bar with `progress_note` beside it; gone when the batch has ended."""
    return Progress(
        TextColumn("{task.description}", style="cyan", markup=False),
        BarColumn(complete_style="cyan", pulse_style="cyan", finished_style="green"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def progress_note(batch: Any) -> str:
    """What a bar cannot show: failures, speed, and the estimated end."""
    _, failed, _ = counts(batch)
    parts = [f"{failed:,} failed"] if failed else []
    if batch.get("tokens_per_second"):
        parts.append(_speed(batch))
    if batch.get("estimated_finish_at"):
        finish = time.localtime(batch["estimated_finish_at"])
        parts.append(f"done about {time.strftime('%H:%M', finish)}")
    return ", ".join(parts)
