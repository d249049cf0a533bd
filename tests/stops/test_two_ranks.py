"""P6 with two real tensor-parallel ranks on the CPU: both stop at the same layer, or none does."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine

TWO_RANKS = {"tensor_parallel_size": 2}
PLAIN = {"TORCHDYNAMO_DISABLE": "1"}
"""On a processor with AVX2 only, torch 2.13 compiles the mask of a vocabulary that is split among
ranks wrongly: stock vLLM ends with an index out of range."""


def assert_ranks_agree(stops: dict[str, list[tuple[int, int]]]) -> None:
    ranks = {name: sorted(made) for name, made in stops.items()}
    assert len(ranks) == 2, f"{len(ranks)} ranks have stopped"
    first, second = ranks.values()
    assert first == second, "ranks stopped at different layers"


def check(played: Any) -> None:
    assert played.status == 0, played.output[-4000:]
    assert_ranks_agree(played.stops)
    played.assert_same_answers()
    played.assert_all_blocks_came_back()


def test_both_stop_at_the_same_layer_and_answers_stay(play: Any) -> None:
    played = play(PLAIN, options=TWO_RANKS, rounds=2)
    check(played)
    stops = played.stops["leader"]
    assert len(stops) > 25
    assert len({layer for _, layer in stops}) > 6, "at all kinds of layers"


@pytest.mark.long
def test_a_rank_that_ignores_the_flag_is_caught(play: Any) -> None:
    """A negative control: rank 1 hears the word and goes on. Its next collective meets rank 0's
    of another step."""
    patience = {**PLAIN, "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "5"}
    played = play(patience, options=TWO_RANKS, rounds=1, careless="follower", limit_s=90)
    assert played.stops["leader"]
    with pytest.raises(AssertionError):
        check(played)


@pytest.mark.long
def test_a_rank_that_waits_in_vain_says_so(play: Any) -> None:
    """A negative control: rank 0 stops and tells nobody."""
    played = play(
        PLAIN,
        options=TWO_RANKS,
        rounds=1,
        careless="leader",
        settings={"rank_timeout_s": 1.0},
        limit_s=90,
    )
    assert played.status != 0
    assert "rank 0 gave no word for safepoint" in played.output
