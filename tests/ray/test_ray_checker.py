"""The check that the fleet's tests end with notices a line that is lost, doubled, swapped or billed
twice: what a store does that takes results from whoever brings them."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import openai
import pytest

from tests.batch.tiny_server import check
from tests.ray.test_ray_fleet import line

LINES = [line(number) for number in range(5)]


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    body = asked["body"]
    choice = {
        "prompt_token_ids": body["prompt"],
        "token_ids": [7] * body["max_tokens"],
        "finish_reason": "length",
    }
    return {
        "custom_id": asked["custom_id"],
        "error": None,
        "response": {"status_code": 200, "body": {"choices": [choice]}},
    }


def client(answers: list[dict[str, Any]], times_billed: int = 1) -> openai.OpenAI:
    """Of a server whose only batch has ended with these."""
    num_input = sum(len(one["body"]["prompt"]) for one in LINES)
    batch = SimpleNamespace(
        status="completed",
        error_file_id=None,
        output_file_id="file",
        request_counts=SimpleNamespace(total=len(LINES), completed=len(LINES), failed=0),
        usage=SimpleNamespace(
            input_tokens=times_billed * num_input, output_tokens=times_billed * 2 * len(LINES)
        ),
    )
    content = SimpleNamespace(iter_lines=lambda: map(json.dumps, answers))
    made = SimpleNamespace(
        batches=SimpleNamespace(retrieve=lambda _: batch),
        files=SimpleNamespace(content=lambda _: content),
    )
    return cast(openai.OpenAI, made)


def test_what_is_right_passes() -> None:
    check(client([answer(one) for one in reversed(LINES)]), "batch", LINES)


def lose(answers: list[dict[str, Any]]) -> None:
    answers.pop()


def double(answers: list[dict[str, Any]]) -> None:
    answers.append(answers[0])


def lose_and_double(answers: list[dict[str, Any]]) -> None:
    answers[0] = answers[1]


def swap(answers: list[dict[str, Any]]) -> None:
    one, other = answers[:2]
    one["response"], other["response"] = other["response"], one["response"]


@pytest.mark.parametrize("spoil", [lose, double, lose_and_double, swap])
def test_what_a_careless_store_hands_out_is_noticed(
    spoil: Callable[[list[dict[str, Any]]], None],
) -> None:
    answers = [answer(one) for one in LINES]
    spoil(answers)
    with pytest.raises(AssertionError):
        check(client(answers), "batch", LINES)


def test_what_is_billed_twice_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check(client([answer(one) for one in LINES], times_billed=2), "batch", LINES)
