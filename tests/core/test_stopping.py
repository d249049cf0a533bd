"""The stop rule, and the step size that pays despite stops."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve.core.latency import LatencyModel, StepShape
from conserve.core.stopping import (
    Arrivals,
    RunningStep,
    best_step_tokens,
    expected_harvest_rate,
    next_step_s,
    should_stop,
    time_to_resume_s,
)
from tests.core import strategies


def stops(
    remaining_s: float, prefill_s: float = 0.1, waited_s: float = 0.0, patience: float = 1.0
) -> bool:
    """should_stop at now = 10 s for a TTFT target of 1 s, where a token takes a millisecond."""
    return should_stop(
        RunningStep(begins_s=9.0 + remaining_s, predicted_s=1.0),
        Arrivals(oldest_s=10.0 - waited_s, num_tokens=round(1000 * prefill_s)),
        LatencyModel(fixed=0.0, per_token=1e-3),
        now_s=10.0,
        ttft_target_s=1.0,
        patience=patience,
    )


def test_stops_where_remainder_and_prefill_would_miss_the_target() -> None:
    assert not stops(remaining_s=0.8, prefill_s=0.1)
    assert stops(remaining_s=0.8, prefill_s=0.3)


def test_time_already_waited_counts() -> None:
    assert not stops(remaining_s=0.5, prefill_s=0.2, waited_s=0.2)
    assert stops(remaining_s=0.5, prefill_s=0.2, waited_s=0.4)


def test_stops_where_the_remainder_is_past_the_patience() -> None:
    assert stops(remaining_s=0.06, patience=0.05)
    assert not stops(remaining_s=0.04, patience=0.05)


def test_no_patience_stops_at_every_arrival() -> None:
    assert stops(remaining_s=1e-6, patience=0.0)


def test_a_step_that_should_be_over_is_left_to_end() -> None:
    assert not stops(remaining_s=0.0, prefill_s=5.0, patience=0.01)
    assert not stops(remaining_s=-0.5, prefill_s=5.0, patience=0.01)


def test_without_patience_a_step_that_outruns_its_prediction_is_stopped() -> None:
    assert stops(remaining_s=0.0, prefill_s=0.01, patience=0.0)
    assert stops(remaining_s=-0.5, prefill_s=0.01, patience=0.0)


def test_a_step_is_left_alone_once_a_stop_would_make_a_token_late() -> None:
    """A quarter of 0.4 s until it has stopped, and 0.1 s for the prompts."""

    def stops_at(now_s: float, due_s: float = math.inf) -> bool:
        return should_stop(
            RunningStep(begins_s=10.6, predicted_s=0.4, due_s=due_s),
            Arrivals(oldest_s=10.0, num_tokens=100),
            LatencyModel(fixed=0.0, per_token=1e-3),
            now_s=now_s,
            ttft_target_s=0.5,
            patience=0.0,
        )

    assert stops_at(10.0, due_s=10.3)
    assert not stops_at(10.15, due_s=10.3)
    assert stops_at(10.15), "no token is due"


def test_what_follows_a_stop_is_the_online_part_and_the_prompts() -> None:
    model = LatencyModel(fixed=0.01, per_token=1e-3, per_decode=1e-3, margin=0.1)
    online = StepShape(num_tokens=2, num_decodes=2, decode_context=300)
    assert next_step_s(model, online, 50) == pytest.approx(0.01 + 0.052 + 0.002)
    assert online.num_tokens == 2, "left as it was"
    assert next_step_s(model, StepShape(), 50) == model.predict_prefill_s(50)
    assert time_to_resume_s(model, 0.08, 0.06) == pytest.approx(0.02 + 0.066)


def simulated_harvest_rate(
    num_tokens: int, step_s: float, rate: float, num_steps: int, seed: int
) -> float:
    """Steps repeated under Poisson arrivals that stop them and void what they did."""
    chance = random.Random(seed)
    harvest, elapsed_s = 0, 0.0
    for _ in range(num_steps):
        arrival_s = chance.expovariate(rate)
        if arrival_s < step_s:
            elapsed_s += arrival_s
        else:
            harvest, elapsed_s = harvest + num_tokens, elapsed_s + step_s
    return harvest / elapsed_s


@pytest.mark.parametrize("rate", [0.1, 1.0, 4.0])
def test_harvest_rate_is_what_a_simulation_measures(rate: float) -> None:
    expected = expected_harvest_rate(1000, 0.5, rate)
    measured = simulated_harvest_rate(1000, 0.5, rate, num_steps=40_000, seed=7)
    # 40,000 steps: the standard error is under 2 % even where one step in seven survives.
    assert measured == pytest.approx(expected, rel=0.05)


def test_harvest_rate_without_arrivals_is_tokens_over_time() -> None:
    assert expected_harvest_rate(1000, 0.5, 0.0) == 2000.0
    assert expected_harvest_rate(1000, 0.5, 1e-6) == pytest.approx(2000.0, rel=1e-6)


def test_harvest_rate_of_hopeless_and_of_empty_steps_is_nothing() -> None:
    assert expected_harvest_rate(1000, 1000.0, 1.0) == 0.0
    assert expected_harvest_rate(0, 0.0, 1.0) == 0.0


def predictor(model: LatencyModel) -> Callable[[int], float]:
    return model.predict_prefill_s


@settings(max_examples=100)
@given(strategies.models(), st.floats(0.0, 50.0), st.integers(1, 64), st.integers(64, 2048))
def test_best_step_harvests_nearly_what_brute_force_finds(
    model: LatencyModel, rate: float, least: int, most: int
) -> None:
    predict_s = predictor(model)

    def harvest(tokens: int) -> float:
        return expected_harvest_rate(tokens, predict_s(tokens), rate)

    chosen = best_step_tokens(predict_s, rate, least, most)
    best = max(harvest(tokens) for tokens in range(least, most + 1))
    assert least <= chosen <= most
    # At the knee the curve has a corner, where a size sqrt(2) off costs the most.
    assert harvest(chosen) >= 0.8 * best


@settings(max_examples=100)
@given(strategies.models(), st.integers(1, 64), st.integers(64, 4096))
def test_best_step_shrinks_as_interruptions_grow_and_never_below_least(
    model: LatencyModel, least: int, most: int
) -> None:
    rates = [0.0, 0.01, 0.1, 1.0, 10.0, 100.0, 1e6]
    sizes = [best_step_tokens(predictor(model), rate, least, most) for rate in rates]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= least


def test_best_step_shrinks_by_how_much() -> None:
    model = LatencyModel(fixed=0.01, per_token=1e-4)
    sizes = [best_step_tokens(predictor(model), rate, 32, 8192) for rate in (0.0, 1.0, 10.0)]
    # The maximum of n / (exp(r T(n)) - 1) lies near sqrt(2 * fixed / r) / per_token.
    assert sizes[0] == 8192
    for size, rate in zip(sizes[1:], (1.0, 10.0), strict=True):
        near = math.sqrt(2 * 0.01 / rate) / 1e-4
        assert near / math.sqrt(2) <= size <= near * math.sqrt(2)


def test_best_step_within_a_range_of_one_or_none() -> None:
    assert best_step_tokens(lambda n: 0.1 * n, 1.0, least=64, most=64) == 64
    assert best_step_tokens(lambda n: 0.1 * n, 1.0, least=64, most=10) == 10


def test_best_step_from_nothing_ends() -> None:
    assert best_step_tokens(lambda n: 1.0 + 0.001 * n, 0.0, least=0, most=100) == 100


def test_ties_take_the_smaller_step() -> None:
    assert best_step_tokens(lambda n: 0.001 * n, 0.0, least=16, most=1024) == 16
