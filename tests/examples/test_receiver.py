"""What the receiver of webhooks prints of a batch, whatever its lines asked for."""

from __future__ import annotations

import runpy
from typing import Any

import pytest

from tests.examples.conftest import EXAMPLES

CALLS: Any = {"choices": [{"message": {"content": None, "tool_calls": []}}]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"choices": [{"message": {"content": "Hi"}}]}, "Hi"),
        ({"choices": [{"text": "upon a time"}]}, "upon a time"),
        ({"data": [{"embedding": [0.5]}]}, '{"data": [{"embedding": [0.5]}]}'),
        (CALLS, '{"choices": [{"message": {"content": null, "tool_calls": []}}]}'),
    ],
)
def test_any_answer_has_words(body: Any, words: str) -> None:
    assert runpy.run_path(str(EXAMPLES / "webhook_receiver.py"))["words"](body) == words
