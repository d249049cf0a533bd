"""The lines of a trace file: as text, and a CSV's by the names of its columns."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

MAX_LINE_CHARS = 4 * 1024 * 1024
BLANK = " \t\r\n\x1a"
"""White space, and the Ctrl-Z with which DOS programs end a file."""


class TraceError(ValueError):
    """A trace file that cannot be used; names the file and the first bad line."""


def read_lines(path: Path, take: Callable[[str], None]) -> None:
    """Give each line that is not blank to `take`, which raises ValueError for a bad one.

    Raises TraceError for a file that cannot be read, or that has bad lines: how many, and the
    first one's number and reason.
    """
    num_bad, first = 0, ""
    for number, line in _numbered(path):
        try:
            take(line)
        except TraceError:
            raise
        except ValueError as error:
            num_bad += 1
            first = first or f"line {number}: {error}"
    if num_bad:
        raise TraceError(f"{path}: {num_bad} bad rows, the first on {first}")


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE_CHARS), ""), 1):
                if len(line) == MAX_LINE_CHARS:
                    raise TraceError(f"{path}: line {number} is longer than {MAX_LINE_CHARS:,}")
                if text := line.strip(BLANK):
                    yield number, text
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error


class CsvColumns:
    """The columns called `names` of a CSV file whose first line names them all.

    A row is one line: what stands in quotes has no line end, so that a stray quote is one bad row.
    """

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self._path = path
        self._names = names
        self._width = 0
        self._places: list[int] = []

    def of(self, line: str) -> list[str] | None:
        """The values in one line; None for the first. Raises ValueError, TraceError."""
        values = _split(line)
        if not self._width:
            self._find(line, [value.strip() for value in values])
            return None
        if len(values) != self._width:
            raise ValueError(f"{len(values)} columns, and the first line has {self._width}")
        return [values[place] for place in self._places]

    def _find(self, line: str, header: list[str]) -> None:
        for name in self._names:
            if name not in header:
                hint = "; columns must be separated by commas" if ";" in line else ""
                told = f"no column {name!r} in the first line, {line[:100]!r}{hint}"
                raise TraceError(f"{self._path}: {told}")
        self._width = len(header)
        self._places = [header.index(name) for name in self._names]


def _split(line: str) -> list[str]:
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise ValueError(f"a stray quote ({error})") from None
