"""A streamed answer: how it is asked for, and its tokens as they arrive."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from conserve.metrics import RequestRecord

STREAMED: Mapping[str, Any] = {
    "stream": True,
    # The count of tokens so far in every message: a message may carry several tokens.
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
"""What a request's body has beside what it asks for."""


async def messages(response: httpx.Response) -> AsyncIterator[dict[str, Any] | None]:
    """The JSON of each server-sent event; None for the last one."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            yield None
        elif line.startswith("data: "):
            yield json.loads(line[6:])


async def refusal(response: httpx.Response) -> str | None:
    """What an answer says that is none; None for one that streams."""
    if response.status_code == 200:
        return None
    text = (await response.aread()).decode(errors="replace")
    return f"HTTP {response.status_code}: {text[:300]}"


def receive(message: Mapping[str, Any], record: RequestRecord, at_s: float) -> None:
    """Count what tokens a message brought to the record, at that time."""
    usage = message.get("usage") or {}
    fresh = int(usage.get("completion_tokens", 0)) - record.num_output_tokens
    record.token_times_s += [at_s] * fresh
    record.num_output_tokens += fresh
    record.num_prompt_tokens = int(usage.get("prompt_tokens", record.num_prompt_tokens))
