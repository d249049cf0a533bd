"""How likely a conversation goes on, learned from silences that ended and ones that did not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve.core.latency import LatencyModel
from conserve.core.returning import NUM_SPANS, Returns, span_of, worth_copying

MODEL = LatencyModel(fixed=0.01, per_token=1e-3)


def silence(returns: Returns, silent_s: float, *, goes_on: bool) -> None:
    for span in range(span_of(silent_s) + 1):
        returns.reached(span)
    if goes_on:
        returns.ended(span_of(silent_s))


def test_spans_double() -> None:
    assert [span_of(s) for s in (-1.0, 0.0, 0.9, 1.0, 1.9, 2.0, 3.9, 4.0)] == [
        *(0, 0, 0, 1, 1, 2, 2, 3)
    ]
    assert span_of(1e9) == NUM_SPANS - 1


def test_what_is_seen_outweighs_what_was_believed() -> None:
    never, always = Returns(), Returns()
    assert 0.3 < never.chance() < 0.7
    for _ in range(100):
        silence(never, 1e6, goes_on=False)
        silence(always, 20.0, goes_on=True)
    assert never.chance() < 0.1
    assert always.chance() > 0.9


def test_who_has_been_silent_longer_than_all_that_went_on_is_given_up() -> None:
    returns, chance = Returns(), random.Random(0)
    for _ in range(400):
        if chance.random() < 0.6:
            silence(returns, chance.uniform(10.0, 60.0), goes_on=True)
        else:
            silence(returns, 3000.0, goes_on=False)
    assert returns.chance(0.0) == pytest.approx(0.6, abs=0.1)
    assert returns.chance(200.0) < 0.15


def test_it_follows_a_change() -> None:
    returns = Returns()
    for _ in range(1000):
        silence(returns, 20.0, goes_on=True)
    for _ in range(1000):
        silence(returns, 1e6, goes_on=False)
    assert returns.chance() < 0.2


@settings(derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(st.floats(0, 1e5), st.booleans()), max_size=60), st.floats(0, 1e5))
def test_a_chance_is_one(silences: list[tuple[float, bool]], silent_s: float) -> None:
    returns = Returns()
    for length_s, goes_on in silences:
        silence(returns, length_s, goes_on=goes_on)
    assert 0.0 <= returns.chance(silent_s) <= 1.0


def test_a_copy_must_save_more_than_it_takes() -> None:
    assert worth_copying(0.5, MODEL, tokens_per_s=1e4)
    assert not worth_copying(0.05, MODEL, tokens_per_s=1e4)
    assert not worth_copying(0.5, MODEL, tokens_per_s=0.0)
