"""The model of a file, read from its first line before the rest is looked at."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec


class _Body(msgspec.Struct):
    model: str


class _Line(msgspec.Struct):
    body: _Body


async def first_model(chunks: AsyncIterator[bytes], max_line_bytes: int) -> str | None:
    """The model that the first line names; None where there is no such line or no such field."""
    head = bytearray()
    async for chunk in chunks:
        head += chunk if head else chunk.lstrip()
        if (b"\n" in chunk and b"\n" in head) or len(head) > max_line_bytes:
            break
    try:
        return msgspec.json.decode(head.partition(b"\n")[0], type=_Line).body.model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
