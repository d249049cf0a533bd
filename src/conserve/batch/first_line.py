"""The model of a file, read from its first line before the rest is looked at."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from conserve.batch.jsonl import num_lead_bytes, request_in


class _Body(msgspec.Struct):
    model: str


class _Line(msgspec.Struct):
    body: _Body


async def first_model(chunks: AsyncIterator[bytes], max_line_bytes: int) -> str | None:
    """The model that the first line names; None where there is no such line or no such field."""
    head = bytearray()
    async for chunk in chunks:
        head += chunk
        del head[: num_lead_bytes(head)]
        if (b"\n" in chunk and b"\n" in head) or len(head) > max_line_bytes:
            break
    try:
        first = request_in(bytes(head.partition(b"\n")[0]))
        return msgspec.json.decode(first, type=_Line).body.model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
