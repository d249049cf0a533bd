from __future__ import annotations

import statistics
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve.workload.arrivals import Bursts, Gamma, Phase, Phases, poisson
from conserve.workload.lengths import Lognormal
from conserve.workload.traces import RatePoint

seeds = st.integers(0, 2**32)


@given(seeds, st.integers(1, 200), st.integers(1, 20), st.floats(10, 500))
def test_bursts_give_every_request_within_the_run(
    seed: int, num_requests: int, burst_size: int, duration_s: float
) -> None:
    bursts = Bursts(
        kind="bursts", num_requests=num_requests, burst_size=burst_size, burst_span_s=0.01
    )
    times = bursts.times(Random(seed), duration_s)
    assert len(times) == num_requests
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < duration_s
    for first in range(0, num_requests, burst_size):
        burst = times[first : first + burst_size]
        assert burst[-1] - burst[0] <= 0.01 + 1e-9


def test_bursts_that_do_not_fit_are_refused() -> None:
    bursts = Bursts(kind="bursts", num_requests=100, burst_size=1, burst_span_s=1.0)
    with pytest.raises(ValueError, match=r"burst_span_s 1.0 fills the 0.1 s"):
        bursts.times(Random(1), 10.0)


@given(seeds)
def test_the_same_seed_gives_the_same_arrivals(seed: int) -> None:
    gamma = Gamma(kind="gamma", rate_rps=2.0, cv=3.0)
    assert gamma.times(Random(seed), 50.0) == gamma.times(Random(seed), 50.0)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_has_its_rate_and_its_variation(cv: float) -> None:
    times = Gamma(kind="gamma", rate_rps=5.0, cv=cv).times(Random(7), 20_000.0)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.05)


def test_phases_go_round_and_keep_their_rates() -> None:
    phases = Phases(
        kind="phases",
        phases=(Phase(seconds=2, rate_rps=10), Phase(seconds=8, rate_rps=0.5)),
    )
    times = phases.times(Random(3), 10_000.0)
    busy = [t for t in times if t % 10 < 2]
    assert len(busy) / 2_000 == pytest.approx(10, rel=0.05)
    assert (len(times) - len(busy)) / 8_000 == pytest.approx(0.5, rel=0.1)


@given(
    seeds,
    st.lists(st.tuples(st.floats(0.1, 20), st.floats(0, 20)), min_size=1, max_size=8),
    st.floats(1, 100),
)
def test_poisson_stays_in_the_run_and_out_of_silence(
    seed: int, phases: list[tuple[float, float]], duration_s: float
) -> None:
    points, start_s = [], 0.0
    for seconds, rate_rps in phases:
        points.append(RatePoint(start_s, rate_rps))
        start_s += seconds
    times = poisson(Random(seed), points, duration_s)
    assert times == sorted(times)
    ends = [point.start_s for point in points[1:]] + [duration_s]
    loud = [(p.start_s, end) for p, end in zip(points, ends, strict=True) if p.rate_rps > 0]
    for time_s in times:
        assert 0 <= time_s <= duration_s
        # Sums of floats may put an arrival a rounding error past its phase.
        assert any(start - 1e-6 <= time_s <= end + 1e-6 for start, end in loud)


def test_doubling_the_rate_keeps_the_order_of_arrivals() -> None:
    slow = poisson(Random(1), [RatePoint(0.0, 1.0)], 100.0)
    fast = poisson(Random(1), [RatePoint(0.0, 2.0)], 50.0)
    assert fast == pytest.approx([t / 2 for t in slow])


@given(seeds, st.floats(1, 1000), st.floats(0, 2), st.integers(1, 50), st.integers(0, 500))
def test_lognormal_stays_within_its_limits(
    seed: int, median: float, sigma: float, least: int, span: int
) -> None:
    length = Lognormal(
        kind="lognormal",
        median_tokens=median,
        sigma=sigma,
        min_tokens=least,
        max_tokens=least + span,
    )
    assert least <= length.draw(Random(seed)) <= least + span
