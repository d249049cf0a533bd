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


class Transcript:
    """What was said in a conversation so far, as token ids: prompts and answers."""

    def __init__(self) -> None:
        self._ids: list[int] = []

    def asked(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body of the next turn, whose prompt is what was said and the body's own."""
        self._ids += body["prompt"]
        return {**body, "prompt": list(self._ids), "return_token_ids": True}

    def answered(self, message: Mapping[str, Any]) -> None:
        """What a streamed message brought belongs to the next prompt."""
        for choice in message.get("choices", ()):
            self._ids += choice.get("token_ids") or ()


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
    if (details := usage.get("prompt_tokens_details")) is not None:
        record.num_cached_tokens = int(details.get("cached_tokens") or 0)
