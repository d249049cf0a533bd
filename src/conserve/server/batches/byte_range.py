"""The one range of bytes that a request for a file's content may name (RFC 9110, section 14)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from conserve.batch.errors import BatchError

ONE_RANGE = re.compile(r"bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.IGNORECASE)


class UnsatisfiableRangeError(BatchError):
    """No byte of the file is in the range."""

    status_code = 416
    code = "range_not_satisfiable"

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"Range: the file has {num_bytes} bytes, and none of these.")
        self.headers = {"content-range": f"bytes */{num_bytes}"}


def asked_range(headers: Mapping[str, str], num_bytes: int, etag: str) -> range | None:
    """Places of the bytes that a GET asks for; None for all of them.

    A range that is none, several at once, and one of another file (`If-Range`) are ignored, as the
    RFC allows: the answer is then the whole. Raises UnsatisfiableRangeError.
    """
    match = ONE_RANGE.fullmatch(headers.get("range", ""))
    if match is None or headers.get("if-range", etag) != etag:
        return None
    first, last = match.groups()
    if not (first or last):
        return None
    found = _span(first, last, num_bytes)
    if not found:
        raise UnsatisfiableRangeError(num_bytes)
    return found


def _span(first: str, last: str, num_bytes: int) -> range:
    """`-5` is the last five bytes."""
    if not first:
        return range(max(0, num_bytes - int(last)), num_bytes)
    end = min(int(last) + 1, num_bytes) if last else num_bytes
    return range(int(first), end)
