"""Usage on the real server: what the answers say, and what they do not."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.waiting import eventually

pytestmark = pytest.mark.server

MODEL = "SmolLM2-135M-Instruct"
QUESTION: Any = [{"role": "user", "content": "Name three colours."}]


def test_usage_is_what_the_answers_say(server: Any) -> None:
    """Of the engine's own counts; a stream that says nothing of its usage counts as well."""

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def counted() -> list[int]:
        days = client.get("/usage?request_class=flex", cast_to=httpx.Response).json()["data"]
        parts = ("input_tokens", "output_tokens")
        tokens = [sum(day["usage"][part] for day in days) for part in parts]
        return [sum(day["completed"] for day in days), *tokens]

    eventually(lambda: server.metric("conserve:usage_waiting_requests") == 0)
    before, told = counted(), []
    asked: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 8, "service_tier": "flex"}
    for n in (1, 3):
        reply = client.chat.completions.create(n=n, **asked)
        assert reply.usage is not None
        told.append((1, reply.usage.prompt_tokens, reply.usage.completion_tokens))
    assert list(client.chat.completions.create(stream=True, temperature=0, **asked))
    told.append((1, told[0][1], 8))
    expected = [was + sum(each) for was, each in zip(before, zip(*told, strict=True), strict=True)]
    eventually(lambda: counted() == expected)
