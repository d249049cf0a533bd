"""How often steps look for a stop, and what a look is found to take."""

from __future__ import annotations

from random import Random

import pytest

from conserve.core.looks import (
    COMPARE_EVERY,
    COST_SHARE,
    LEAST_LOOKS,
    LEAST_SEEN,
    SHORT_S,
    LookCost,
    layers_between_looks,
    num_looks,
)

NUM_LAYERS = 80
STEP_S = 0.02


@pytest.mark.parametrize("step_s", [0.005, 0.02, 0.2, 2.0])
@pytest.mark.parametrize("look_s", [0.0, 1e-5, 167e-6, 5e-3])
def test_looks_take_a_hundredth_of_a_step_or_are_the_least_there_are(
    step_s: float, look_s: float
) -> None:
    looks = num_looks(NUM_LAYERS, layers_between_looks(step_s, NUM_LAYERS, look_s=look_s))
    assert looks >= LEAST_LOOKS
    assert looks == LEAST_LOOKS or looks * look_s <= COST_SHARE * step_s * (1 + 1e-9)


@pytest.mark.parametrize("step_s", [0.005, 0.02, 0.2, 2.0])
def test_dear_looks_are_never_closer_than_cheap_ones(step_s: float) -> None:
    spacings = [layers_between_looks(step_s, NUM_LAYERS, look_s=s) for s in (0.0, 1e-5, 1e-3, 1.0)]
    assert spacings == sorted(spacings)


def served(
    look_s: float,
    *,
    noise: float,
    num_steps: int = 200 * COMPARE_EVERY,
    step_s: float = STEP_S,
) -> LookCost:
    """After so many steps whose looks take `look_s`, with normal noise of that share of them."""
    cost, chance = LookCost(), Random(3)
    for _ in range(num_steps):
        looks = num_looks(NUM_LAYERS, cost.layers_between(step_s, NUM_LAYERS))
        seconds = step_s * (1 + chance.gauss(0.0, noise)) + looks * look_s
        cost.ended(seconds, step_s, looks)
    return cost


def test_what_a_look_takes_is_learned_and_looks_become_rarer() -> None:
    cost = served(167e-6, noise=0.01)
    assert cost.seconds == pytest.approx(167e-6, rel=0.35)
    assert num_looks(NUM_LAYERS, cost.layers_between(STEP_S, NUM_LAYERS)) == LEAST_LOOKS


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_noise_is_not_taken_for_the_cost_of_looks(noise: float) -> None:
    """A hundredth of a step would be 100 us a look and more."""
    assert served(0.0, noise=noise).seconds < 0.2 * COST_SHARE * STEP_S


def test_a_few_steps_say_nothing() -> None:
    cost = served(167e-6, noise=0.0, num_steps=(LEAST_SEEN - 1) * COMPARE_EVERY)
    assert cost.seconds == 0.0


def test_long_steps_never_look_less_than_all_must() -> None:
    cost = LookCost()
    spacings = [cost.layers_between(2 * SHORT_S, NUM_LAYERS) for _ in range(COMPARE_EVERY)]
    looks = [num_looks(NUM_LAYERS, every) for every in spacings]
    assert looks.count(LEAST_LOOKS) == 1
    assert min(looks) == LEAST_LOOKS


def test_an_engine_whose_steps_are_all_long_learns_it_too() -> None:
    """As where the targets alone say how slow chat may get: looks at every layer would take a
    tenth of such a step."""
    cost = served(167e-6, noise=0.01, step_s=0.12)
    looks = num_looks(NUM_LAYERS, cost.layers_between(0.12, NUM_LAYERS))
    assert looks * 167e-6 < 4 * COST_SHARE * 0.12


def test_steps_that_something_else_held_up_are_left_out() -> None:
    cost = LookCost()
    for _ in range(2 * LEAST_SEEN):
        cost.ended(STEP_S, STEP_S, 1)
        cost.ended(2 * STEP_S, STEP_S, NUM_LAYERS)
    assert cost.seconds == 0.0
