"""Readers of public traces. A bad row stops them, with the count and the first line number."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

RequestFormat = Literal["azure", "mooncake"]
LengthFormat = Literal["azure", "mooncake", "arxiv"]

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens that one of Mooncake's hash_ids stands for (the last one of a prompt may be shorter)."""


class TraceError(ValueError):
    """A trace file that cannot be used; names the file and the first bad line."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace: seconds since the trace's first request, tokens in and out.

    prefix_ids: Mooncake's ids of the prompt's 512-token blocks; equal ids are equal text.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    prefix_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RatePoint:
    """From `start_s` on, `rate_rps` requests a second."""

    start_s: float
    rate_rps: float


def read_requests(path: Path, format: RequestFormat) -> list[TraceRow]:  # noqa: A002
    """The requests of an Azure LLM inference CSV or a Mooncake JSONL, by arrival.

    Raises TraceError for a file that cannot be read, has bad rows, or holds no request.
    """
    rows = _read(path, _azure if format == "azure" else _mooncake)
    rows.sort(key=lambda row: row.arrival_s)
    zero_s = rows[0].arrival_s
    return [replace(row, arrival_s=row.arrival_s - zero_s) for row in rows]


def read_lengths(path: Path, format: LengthFormat) -> list[tuple[int, int]]:  # noqa: A002
    """(prompt, output) tokens of each row of a trace. Raises TraceError."""
    if format == "arxiv":
        return _read(path, _arxiv)
    return [(r.num_prompt_tokens, r.num_output_tokens) for r in read_requests(path, format)]


def read_rates(path: Path) -> list[RatePoint]:
    """A rate over time: a CSV of t_seconds and requests_per_second, t rising. Raises TraceError."""
    points = _read(path, _servegen)
    for earlier, later in pairwise(points):
        if later.start_s <= earlier.start_s:
            raise TraceError(f"{path}: t_seconds falls from {earlier.start_s} to {later.start_s}")
    return points


_Row = dict[str, Any]
Parsed = TypeVar("Parsed")


def _azure(row: _Row) -> TraceRow:
    # Seven digits of a second; datetime takes six.
    when = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
    # The trace has no time zone; differences are all that is used.
    seconds = (when - datetime(2020, 1, 1)).total_seconds()
    return TraceRow(seconds, _tokens(row, "ContextTokens"), _tokens(row, "GeneratedTokens"))


def _mooncake(line: str) -> TraceRow:
    row: _Row = json.loads(line)
    return TraceRow(
        float(row["timestamp"]) / 1000,
        _tokens(row, "input_length"),
        _tokens(row, "output_length"),
        tuple(int(i) for i in row.get("hash_ids", ())),
    )


def _arxiv(row: _Row) -> tuple[int, int]:
    return _tokens(row, "num_prefill_tokens"), _tokens(row, "num_decode_tokens")


def _servegen(row: _Row) -> RatePoint:
    start_s, rate_rps = float(row["t_seconds"]), float(row["requests_per_second"])
    if not 0 <= rate_rps < float("inf"):
        raise ValueError(f"requests_per_second is {rate_rps}")
    return RatePoint(start_s, rate_rps)


def _tokens(row: _Row, column: str) -> int:
    count = int(row[column])
    if count < 0:
        raise ValueError(f"{column} is {count}")
    return max(count, 1)


def _read(path: Path, parse: Callable[[Any], Parsed]) -> list[Parsed]:
    parsed: list[Parsed] = []
    bad: list[tuple[int, str]] = []
    for number, row in _rows(path):
        try:
            parsed.append(parse(row))
        except KeyError as error:
            bad.append((number, f"no column {error}"))
        except (ValueError, TypeError, AttributeError) as error:
            bad.append((number, str(error)))
    if bad:
        number, reason = bad[0]
        raise TraceError(f"{path}: {len(bad)} bad rows, the first on line {number}: {reason}")
    if not parsed:
        raise TraceError(f"{path}: no rows")
    return parsed


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, a CSV row as a dict or a JSON line as text)."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                yield from ((n, line) for n, line in enumerate(file, 1) if line.strip())
            else:
                reader = csv.DictReader(file)
                yield from ((reader.line_num, row) for row in reader)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
