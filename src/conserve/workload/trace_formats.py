"""How each public trace spells a request: readers of one line into columns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from .trace_columns import MAX_TOKENS, Columns
from .trace_lines import CsvColumns

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens that one of Mooncake's hash_ids stands for (the last one of a prompt may be shorter)."""

PROMPT, OUTPUT = "input_length", "output_length"
TimestampUnit = Literal["ms", "s"]

# A trace without a time zone is read as UTC; differences are all that is used.
_ZERO = datetime(2020, 1, 1)
_ZERO_UTC = datetime(2020, 1, 1, tzinfo=UTC)
_SHORTEST_TIME = len("2023-11-16 18:15:46")


class CsvRequests:
    """Requests of a CSV: columns of arrivals (where there is one), tokens in, tokens out."""

    def __init__(
        self,
        path: Path,
        columns: Columns,
        names: tuple[str, ...],
        seconds: Callable[[str, str], float] | None,
        *,
        drops_failed: bool = False,
    ) -> None:
        self._csv = CsvColumns(path, names)
        self._columns = columns
        self._names = names
        self._seconds = seconds
        self._drops_failed = drops_failed

    def take(self, line: str) -> None:
        values = self._csv.of(line)
        if values is None:
            return
        prompt, output = (count(*pair) for pair in zip(values[-2:], self._names[-2:], strict=True))
        if self._drops_failed and output == 0:
            self._columns.num_failed += 1
            return
        if self._seconds:
            self._columns.arrival_s.append(self._seconds(values[0], self._names[0]))
        self._columns.prompt.append(max(prompt, 1))
        self._columns.output.append(max(output, 1))


def azure(path: Path, columns: Columns) -> CsvRequests:
    """Azure's LLM inference traces of 2023 and 2024."""
    return CsvRequests(path, columns, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), clock_s)


def burstgpt(path: Path, columns: Columns) -> CsvRequests:
    """BurstGPT's traces. A request without response tokens has failed."""
    names = ("Timestamp", "Request tokens", "Response tokens")
    return CsvRequests(path, columns, names, number, drops_failed=True)


def arxiv(path: Path, columns: Columns) -> CsvRequests:
    """Vidur's lengths of arXiv summaries."""
    return CsvRequests(path, columns, ("num_prefill_tokens", "num_decode_tokens"), None)


@dataclass(frozen=True, slots=True)
class Mooncake:
    """Mooncake's JSON lines, and those of others who write them in its manner.

    timestamp_unit, block_tokens: what the file does not say of itself. Where they are not given
    they are Mooncake's own, and a file that does not fit them is refused.
    """

    columns: Columns
    timestamp_unit: TimestampUnit | None = None
    block_tokens: int | None = None

    def take(self, line: str) -> None:
        row = _object(line)
        arrival_s = self._seconds(row)
        prompt, output = count(_of(row, PROMPT), PROMPT), count(_of(row, OUTPUT), OUTPUT)
        ids = self._blocks(row, prompt)
        self.columns.prefix_ids.extend(ids)
        self.columns.prefix_ends.append(len(self.columns.prefix_ids))
        self.columns.arrival_s.append(arrival_s)
        self.columns.prompt.append(max(prompt, 1))
        self.columns.output.append(max(output, 1))

    def _seconds(self, row: dict[str, Any]) -> float:
        time = number(_of(row, "timestamp"), "timestamp")
        if self.timestamp_unit is None and not time.is_integer():
            raise ValueError(
                f"timestamp is {time}, not whole milliseconds: where they are seconds, give "
                'timestamp_unit = "s", else "ms"'
            )
        return time if self.timestamp_unit == "s" else time / 1000

    def _blocks(self, row: dict[str, Any], num_tokens: int) -> list[int]:
        ids = row.get("hash_ids") or []
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**64 for i in ids):
            raise ValueError("hash_ids must be a list of whole numbers of up to 64 bits")
        size = self.block_tokens or MOONCAKE_BLOCK_TOKENS
        if ids and len(ids) not in (num_tokens // size, -(-num_tokens // size)):
            raise ValueError(
                f"{len(ids)} hash_ids for {num_tokens} tokens do not stand for {size} each: give "
                "the trace's own block_tokens"
            )
        return ids


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict):
        return row
    array = ", but an array: write one object a line" if line.startswith("[") else ""
    raise ValueError(f"{line[:50]!r} is no JSON object{array}")


def _of(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise ValueError(f"no {name!r}")
    return row[name]


def clock_s(text: str, name: str) -> float:
    """Seconds since some day, of a date and time with a zone or without. Raises ValueError."""
    when: datetime | None = None
    with suppress(ValueError):
        when = datetime.fromisoformat(text.strip())
    if when is None or len(text) < _SHORTEST_TIME:
        raise ValueError(f"{name} is {text!r}, no time such as 2023-11-16 18:15:46.68")
    return (when - (_ZERO_UTC if when.tzinfo else _ZERO)).total_seconds()


def number(value: Any, name: str) -> float:
    """Raises ValueError: no number, or none that is finite."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{name} is {value!r}, no number")
    return found


def count(value: Any, name: str) -> int:
    """A number of tokens; 90.0 is 90. Raises ValueError."""
    try:
        found = int(value) if isinstance(value, str) else value
    except ValueError:
        found = value
    if type(found) is not int:
        exact = number(value, name)
        if not exact.is_integer():
            raise ValueError(f"{name} is {value!r}, no whole number")
        found = int(exact)
    if not 0 <= found <= MAX_TOKENS:
        raise ValueError(f"{name} is {found}, not from 0 to {MAX_TOKENS}")
    return found
