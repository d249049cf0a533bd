"""P1 and P4 on a real engine and a real (small, random) model: stops leave no trace in answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine

ONE_PROCESS = {"distributed_executor_backend": "uni"}
WHATEVER_THE_GAP = {"policy": {"stop_gap_share": 1.0}}
"""Steps of so small a model are not worth the gap behind those that can be stopped."""


def check(played: Any, num_stops: int) -> None:
    assert played.status == 0, played.output[-4000:]
    assert played.result["can_stop"]
    stops = played.stops["leader"]
    assert len(stops) >= num_stops
    assert len({layer for _, layer in stops}) > 6, "at all kinds of layers"
    played.assert_same_answers()
    played.assert_all_blocks_came_back()


def test_every_kind_of_request_answers_as_if_nothing_had_been_stopped(
    play: Any, tiny_lora: Path
) -> None:
    """With LoRA: a JSON schema, a regex, penalties, logprobs, chunked prompts and shared
    prefixes; with online requests coming in between, and all KV forgotten now and then, under a
    pause, as it is when weights are updated."""
    check(play(lora=str(tiny_lora), options=ONE_PROCESS, reset_every=50), num_stops=30)


def test_under_async_scheduling_too(play: Any) -> None:
    """Steps are scheduled before the one ahead of them has told its tokens. Without LoRA, but
    with prompt logprobs."""
    played = play(options=ONE_PROCESS, settings=WHATEVER_THE_GAP, **{"async": True})
    assert played.status == 0, played.output[-4000:]
    assert played.result["steps_in_flight"] == 2
    check(played, num_stops=15)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 5))
def test_thousands_of_stops_on_a_real_engine(play: Any, tiny_lora: Path, seed: int) -> None:
    played = play(lora=str(tiny_lora), options=ONE_PROCESS, seed=seed, rounds=24, limit_s=500)
    check(played, num_stops=400)


@pytest.mark.long
def test_an_engine_that_samples_from_stopped_steps_is_caught(play: Any) -> None:
    """The negative control: the scheduler takes stopped steps for done."""
    played = play(options=ONE_PROCESS, careless="scheduler")
    if played.status == 0:
        with pytest.raises((AssertionError, KeyError)):
            check(played, num_stops=10)
