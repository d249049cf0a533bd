"""Readers of public traces. A bad row stops them, with the count and the first line number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

from .trace_columns import Columns, TokenCounts, Trace
from .trace_formats import (
    Mooncake,
    TimestampUnit,
    arxiv,
    azure,
    burstgpt,
    number,
)
from .trace_lines import CsvColumns, TraceError, read_lines

RequestFormat = Literal["azure", "burstgpt", "mooncake"]
LengthFormat = Literal["azure", "burstgpt", "mooncake", "arxiv"]

BUSIEST_RPS = 1000.0
"""A mean rate above it is taken for timestamps in another unit, unless the unit is given."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a trace file is written; what only Mooncake's have is None for others, and for
    Mooncake's own values."""

    format: LengthFormat
    timestamp_unit: TimestampUnit | None = None
    block_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class RatePoint:
    """From `start_s` on, `rate_rps` requests a second."""

    start_s: float
    rate_rps: float


def read_requests(path: Path, spelling: Spelling) -> Trace:
    """The requests of a trace, by arrival. The last few traces read are remembered.

    Raises TraceError for a file that cannot be read, has bad rows, or holds no request.
    """
    return _remembered_trace(path, _version(path), spelling)


def read_lengths(path: Path, spelling: Spelling) -> TokenCounts:
    """Tokens of each request of a trace. Raises TraceError."""
    if spelling.format == "arxiv":
        return _columns(path, spelling).counts()
    return read_requests(path, spelling).tokens


def read_rates(path: Path) -> list[RatePoint]:
    """A rate over time: a CSV of t_seconds and requests_per_second, t rising. Raises TraceError."""
    names = ("t_seconds", "requests_per_second")
    columns = CsvColumns(path, names)
    points: list[RatePoint] = []

    def take(line: str) -> None:
        if values := columns.of(line):
            start_s, rate_rps = (number(*pair) for pair in zip(values, names, strict=True))
            if rate_rps < 0:
                raise ValueError(f"requests_per_second is {rate_rps}")
            points.append(RatePoint(start_s, rate_rps))

    read_lines(path, take)
    if not points:
        raise TraceError(f"{path}: no rows")
    for earlier, later in pairwise(points):
        if later.start_s <= earlier.start_s:
            raise TraceError(f"{path}: t_seconds falls from {earlier.start_s} to {later.start_s}")
    return points


def _version(path: Path) -> tuple[int, int]:
    """Another one where the file has changed. Raises TraceError."""
    try:
        found = path.stat()
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=2)
def _remembered_trace(path: Path, version: tuple[int, int], spelling: Spelling) -> Trace:
    """Each seed and point of a scenario asks for the same file."""
    trace = _columns(path, spelling).trace()
    _check_unit(path, spelling, trace)
    return trace


def _columns(path: Path, spelling: Spelling) -> Columns:
    columns = Columns()
    match spelling.format:
        case "azure":
            take = azure(path, columns).take
        case "burstgpt":
            take = burstgpt(path, columns).take
        case "arxiv":
            take = arxiv(path, columns).take
        case "mooncake":
            take = Mooncake(columns, spelling.timestamp_unit, spelling.block_tokens).take
    read_lines(path, take)
    if not columns.prompt:
        failed = columns.num_failed
        why = f"none of its {failed:,} requests has an answer" if failed else "no rows"
        raise TraceError(f"{path}: {why}")
    return columns


def _check_unit(path: Path, spelling: Spelling, trace: Trace) -> None:
    span_s = float(trace.arrival_s[-1])
    guessed = spelling.format == "mooncake" and spelling.timestamp_unit is None
    if guessed and len(trace) - 1 > BUSIEST_RPS * span_s > 0:
        raise TraceError(
            f"{path}: {len(trace)} requests in {span_s:.3g} s: where the timestamps are seconds, "
            'give timestamp_unit = "s", else "ms"'
        )
