"""What one request did, as its client saw it: the record every room shares."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

CUT_OFF = "cut off: the run ended"
"""`error` of a request that was still healthy when the run ended; it is no failure."""
UNFINISHED = "not finished when the run ended"
"""The same of an online request, which should have been: it is one."""


@dataclass(slots=True)
class RequestRecord:
    """One request. Every time is in seconds on one clock whose zero is the start of the run.

    token_times_s: when each output token reached the client, in order, one entry a token; tokens
    that arrive in one message share its time.
    num_output_tokens: tokens received; equal to len(token_times_s) where token times were kept.
    num_cached_tokens: prompt tokens whose KV was there already, so that they were not computed when
    it first ran; None where the server does not say.
    error: None for a request that finished, CUT_OFF, or what went wrong.
    """

    request_id: str
    online: bool
    arrival_s: float
    token_times_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None
    num_cached_tokens: int | None = None

    @property
    def finished(self) -> bool:
        return self.error is None

    @property
    def failed(self) -> bool:
        return self.error is not None and self.error != CUT_OFF

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token; None before the first token."""
        return self.token_times_s[0] - self.arrival_s if self.token_times_s else None

    @property
    def tbts_s(self) -> list[float]:
        """Each gap between neighbouring tokens: n - 1 values for n tokens."""
        times = self.token_times_s
        return [later - earlier for earlier, later in pairwise(times)]

    @property
    def tpot_s(self) -> float | None:
        """(last - first token) / (n - 1); None with fewer than two tokens."""
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


class BadRecordError(ValueError):
    """A line of a record file that is not a record; names the file and the line."""


_FIELDS = {f.name for f in fields(RequestRecord)}


def write_records(path: Path, records: Iterable[RequestRecord]) -> None:
    """One JSON object a line, times to the microsecond; compressed when `path` ends in .gz.

    The bytes depend on the records alone.
    """
    with _open_write(path) as file:
        for record in records:
            row = asdict(record)
            row["arrival_s"] = round(record.arrival_s, 6)
            if record.num_cached_tokens is None:
                del row["num_cached_tokens"]
            row["token_times_s"] = [round(t, 6) for t in record.token_times_s]
            file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")


def read_records(path: Path) -> list[RequestRecord]:
    """The records of a file that `write_records` wrote; raises BadRecordError."""
    with _open_read(path) as file:
        return [_record(path, number, line) for number, line in enumerate(file, 1) if line.strip()]


def _record(path: Path, number: int, line: bytes) -> RequestRecord:
    try:
        row: dict[str, Any] = json.loads(line)
        if unknown := sorted(set(row) - _FIELDS):
            raise BadRecordError(f"{path}: line {number}: unknown field {unknown[0]!r}")
        return RequestRecord(**row)
    except (json.JSONDecodeError, TypeError) as error:
        raise BadRecordError(f"{path}: line {number}: not a request record: {error}") from error


@contextmanager
def _open_write(path: Path) -> Iterator[IO[bytes]]:
    with path.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                yield packed  # type: ignore[misc]
        else:
            yield raw


def _open_read(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
