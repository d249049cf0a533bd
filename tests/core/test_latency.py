"""The latency model against its own formula and against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve.core.latency import LatencyModel, StepShape
from tests.core import strategies

MODEL = LatencyModel(
    fixed=0.01, per_token=1e-4, per_pair=1e-8, per_decode=1e-5, per_context=1e-9, knee=128
)


def brute_force_fitting(
    model: LatencyModel, shape: StepShape, context: int, limit_s: float, most: int
) -> int:
    """The largest chunk up to `most` that fits, one after the other."""
    fitting = 0
    for tokens in range(1, most + 1):
        grown = StepShape(
            shape.num_tokens, shape.attention_pairs, shape.num_decodes, shape.decode_context
        )
        grown.add_prefill(tokens, context)
        if model.predict_s(grown) * (1 + model.margin) > limit_s:
            return fitting
        fitting = tokens
    return fitting


def test_a_chunk_reads_its_context_and_half_of_itself() -> None:
    shape = StepShape()
    shape.add_prefill(100, 1000)
    pairs = 100 * 1000 + 100 * 100 / 2
    assert shape == StepShape(num_tokens=100, attention_pairs=pairs, num_prefill_tokens=100)


def test_a_decode_reads_its_context_once() -> None:
    shape = StepShape()
    shape.add_decode(1, 700)
    shape.add_decode(3, 300)
    assert shape == StepShape(num_tokens=4, num_decodes=2, decode_context=1000)


def test_step_time_is_the_sum_of_its_terms() -> None:
    shape = StepShape(num_tokens=300, attention_pairs=5e5, num_decodes=40, decode_context=80_000)
    expected_s = 0.01 + 1e-4 * 300 + 1e-8 * 5e5 + 1e-5 * 40 + 1e-9 * 80_000
    assert MODEL.predict_s(shape) == pytest.approx(expected_s, rel=1e-12)


def test_tokens_below_the_knee_cost_as_much_as_the_knee() -> None:
    one, knee, above = (StepShape(num_tokens=n) for n in (1, 128, 129))
    assert MODEL.predict_s(one) == MODEL.predict_s(knee) == pytest.approx(0.01 + 128e-4)
    assert MODEL.predict_s(above) - MODEL.predict_s(knee) == pytest.approx(1e-4)


def test_an_empty_step_takes_no_time() -> None:
    assert MODEL.predict_s(StepShape()) == 0.0


def test_a_lone_chunk_is_a_step_with_one_chunk() -> None:
    shape = StepShape()
    shape.add_prefill(400, 50)
    assert MODEL.predict_prefill_s(400, 50) == MODEL.predict_s(shape)


@given(strategies.models(), strategies.shapes())
def test_prediction_is_features_times_coefficients(model: LatencyModel, shape: StepShape) -> None:
    products = zip(model.coefficients, model.features(shape), strict=True)
    expected_s = sum(c * f for c, f in products) if shape.num_tokens else 0.0
    assert model.predict_s(shape) == pytest.approx(expected_s, rel=1e-12)
    assert LatencyModel.of(model.coefficients, model.knee, model.margin) == model


@given(strategies.models(), strategies.shapes(), st.integers(0, 20_000), st.floats(0.0, 1.0))
def test_fitting_prefill_tokens_is_the_largest_that_fits(
    model: LatencyModel, shape: StepShape, context: int, limit_s: float
) -> None:
    most = 600
    fitting = model.fitting_prefill_tokens(shape, context, limit_s)
    expected = brute_force_fitting(model, shape, context, limit_s, most)
    # One token of play, where the limit falls on a whole token within rounding.
    assert abs(min(fitting, most) - expected) <= 1
    if abs(min(fitting, most) - expected) == 1:
        grown = StepShape(
            shape.num_tokens, shape.attention_pairs, shape.num_decodes, shape.decode_context
        )
        grown.add_prefill(max(fitting, expected), context)
        assert model.predict_s(grown) * (1 + model.margin) == pytest.approx(limit_s, rel=1e-9)


def test_fitting_chunk_on_an_empty_step_below_at_and_above_the_knee() -> None:
    model = LatencyModel(fixed=0.01, per_token=1e-4, knee=100)
    at_knee_s = 0.01 + 100e-4
    assert model.fitting_prefill_tokens(StepShape(), 0, at_knee_s - 1e-6) == 0
    assert model.fitting_prefill_tokens(StepShape(), 0, at_knee_s + 1e-9) == 100
    assert model.fitting_prefill_tokens(StepShape(), 0, at_knee_s + 50.5e-4) == 150


def test_margin_is_left_free() -> None:
    model = LatencyModel(fixed=0.0, per_token=1e-3, margin=0.25)
    assert model.fitting_prefill_tokens(StepShape(), 0, 0.1001) == 80


def test_a_step_past_its_limit_takes_no_more() -> None:
    shape = StepShape(num_tokens=500)
    assert MODEL.fitting_prefill_tokens(shape, 0, MODEL.predict_s(shape) / 2) == 0


@pytest.mark.parametrize("per_pair", [1e-14, 1e-18, 1e-22, 1e-30])
def test_a_tiny_attention_cost_does_not_cancel_the_chunk_away(per_pair: float) -> None:
    model = LatencyModel(fixed=0.0, per_token=1e-4, per_pair=per_pair)
    assert model.fitting_prefill_tokens(StepShape(), 0, 0.10005) == 1000


def test_free_tokens_are_bounded_by_the_caller_only() -> None:
    model = LatencyModel(fixed=0.01, per_token=0.0)
    assert model.fitting_prefill_tokens(StepShape(), 0, 0.02) == 2**31
