"""The chats that the fleet's test makes notice what is wrong with an answer, and nothing else."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.ray.chats import Chat, _ask


def event(finish_reason: str | None = None) -> str:
    return f"data: {json.dumps({'choices': [{'finish_reason': finish_reason}]})}\n\n"


ERROR = 'data: {"error": {"message": "the engine is gone"}}\n\n'
DONE = "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (200, event() * 6 + event("length") + DONE, None),  # two tokens in one event
        (200, event() * 7, "the stream broke off"),
        (200, "", "the stream broke off"),
        (200, event() + ERROR + DONE, "the engine is gone"),
        (503, "away", "503: away"),
    ],
)
def test_an_answer_is_whole_or_not(status: int, text: str, error: str | None) -> None:
    transport = httpx.MockTransport(
        lambda _: httpx.Response(status, text=text, headers={"x-conserve-replica": "one"})
    )
    chat = Chat(0.0)
    with httpx.Client(base_url="http://fleet", transport=transport) as client:
        _ask(client, chat)
    assert chat.replica == "one"
    assert (error or "") in (chat.error or "")
    assert (chat.error is None) == (error is None)
