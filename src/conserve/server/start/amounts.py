"""Amounts of memory, as they are said."""

from __future__ import annotations

GIB = 1 << 30


def gib(num_bytes: float, digits: int = 1) -> str:
    return f"{num_bytes / GIB:.{digits}f} GiB"
