"""Scaling a trace keeps its shape: properties over made-up traces."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from conserve.workload.scaling import (
    Scale,
    length_factor,
    scaled_length,
    squeezed_rates,
    time_factor,
    window,
)
from conserve.workload.trace_columns import TraceRow
from conserve.workload.traces import RatePoint

lengths = st.lists(st.integers(1, 100_000), min_size=1, max_size=50)


@st.composite
def traces(draw: st.DrawFn) -> list[TraceRow]:
    gaps = draw(st.lists(st.floats(0.01, 100), min_size=5, max_size=60))
    rows, now_s = [TraceRow(0.0, 1, 1)], 0.0
    for gap in gaps:
        now_s += gap
        rows.append(TraceRow(now_s, 1, 1))
    return rows


@given(lengths, st.floats(1, 5000))
def test_lengths_get_the_wanted_mean(tokens: list[int], mean: float) -> None:
    factor = length_factor(tokens, mean)
    assert sum(t * factor for t in tokens) / len(tokens) == pytest.approx(mean)


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.floats(1e-4, 10), st.integers(1, 10**6))
def test_scaled_lengths_keep_order_and_limits(a: int, more: int, factor: float, most: int) -> None:
    short, long = (scaled_length(n, factor, most) for n in (a, a + more))
    assert 1 <= short <= long <= most


@given(traces(), st.floats(0.01, 10))
def test_time_gets_the_wanted_rate(rows: list[TraceRow], rate_rps: float) -> None:
    span_s = rows[-1].arrival_s * time_factor(rows, rate_rps)
    assert (len(rows) - 1) / span_s == pytest.approx(rate_rps)


@pytest.mark.parametrize("times", [[], [0.0], [0.0, 0.0]])
def test_a_trace_without_time_cannot_be_scaled(times: list[float]) -> None:
    with pytest.raises(ValueError, match="two requests at different times"):
        time_factor([TraceRow(t, 1, 1) for t in times], 1.0)


@given(traces(), st.floats(0.1, 10), st.floats(0.05, 0.95), st.integers(0, 1000))
def test_a_window_keeps_gaps_stretched(
    rows: list[TraceRow], time: float, share: float, seed: int
) -> None:
    duration_s = rows[-1].arrival_s * time * share
    inside = window(rows, time, duration_s, Random(seed))
    assert all(0 <= row.arrival_s < duration_s for row in inside)
    original = {round(b.arrival_s - a.arrival_s, 6) for a, b in pairwise(rows)}
    for a, b in pairwise(inside):
        assert any(
            (b.arrival_s - a.arrival_s) / time == pytest.approx(g, abs=1e-4) for g in original
        )
    assert inside == window(rows, time, duration_s, Random(seed))


def test_a_window_longer_than_the_trace_is_refused() -> None:
    rows = [TraceRow(0.0, 1, 1), TraceRow(10.0, 1, 1)]
    with pytest.raises(ValueError, match=r"holds 20 s at this rate and the run lasts\s+30 s"):
        window(rows, 2.0, 30.0, Random(1))


@given(
    st.lists(st.just(0.0) | st.floats(0.01, 500), min_size=3, max_size=40),
    st.floats(0, 1),
    st.floats(0.1, 1),
    st.floats(1, 300),
    st.floats(0.1, 5),
)
def test_squeezed_rates_have_the_wanted_mean_and_the_trace_s_shape(
    rates: list[float], start: float, share: float, duration_s: float, rate_rps: float
) -> None:
    points = [RatePoint(600.0 * i, rate) for i, rate in enumerate(rates)]
    whole_s = 600.0 * len(rates)
    seconds = whole_s * share
    start_s = (whole_s - seconds) * start
    assume(start_s + seconds <= whole_s)
    try:
        squeezed = squeezed_rates(points, start_s, seconds, duration_s, rate_rps)
    except ValueError as error:
        assert "no requests" in str(error)  # noqa: PT017 - silence is a trace's right
        return
    ends = [point.start_s for point in squeezed[1:]] + [duration_s]
    count = sum(p.rate_rps * (end - p.start_s) for p, end in zip(squeezed, ends, strict=True))
    assert squeezed[0].start_s == 0.0
    assert count / duration_s == pytest.approx(rate_rps, rel=1e-6)
    positive = [p.rate_rps for p in squeezed if p.rate_rps > 0]
    of_trace = [r for r in rates if r > 0]
    assert max(positive) / min(positive) <= max(of_trace) / min(of_trace) * (1 + 1e-9)


@pytest.mark.parametrize(("start_s", "seconds"), [(0, 1900), (1000, 900)])
def test_rates_beyond_the_trace_are_refused(start_s: float, seconds: float) -> None:
    points = [RatePoint(600.0 * i, 1.0) for i in range(3)]
    with pytest.raises(ValueError, match="the trace covers 0 to 1800 s"):
        squeezed_rates(points, start_s, seconds, 60, 1)


def test_a_scale_says_what_was_done() -> None:
    scale = Scale("azure", time=4.277, prompt=0.12212, output=0.5)
    assert str(scale) == "azure: time x 4.277, prompts x 0.1221, outputs x 0.5"
