"""Percentiles from buckets agree with the exact ones as far as the buckets allow."""

from __future__ import annotations

from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve.metrics import bucket_percentile, percentile, share_within

BOUNDS = [0.1, 0.2, 0.5, 1.0, 2.0]
VALUES = st.lists(st.floats(min_value=0, max_value=1.99), min_size=1, max_size=200)


def counted(values: list[float]) -> list[float]:
    counts = [0.0] * (len(BOUNDS) + 1)
    for value in values:
        counts[bisect_left(BOUNDS, value)] += 1
    return counts


@given(VALUES, st.sampled_from([1, 25, 50, 90, 99, 100]))
def test_a_percentile_lies_in_the_bucket_of_its_rank(values: list[float], q: float) -> None:
    found = bucket_percentile(BOUNDS, counted(values), q)
    assert found is not None
    rank = max(1, -(-len(values) * q // 100))  # the smallest value with q % at or below it
    exact = sorted(values)[int(rank) - 1]
    place = bisect_left(BOUNDS, exact)
    assert ([0.0, *BOUNDS][place]) <= found <= BOUNDS[place]


def test_inside_a_bucket_it_is_a_straight_line() -> None:
    counts = [0.0, 0.0, 4.0, 0.0, 0.0, 0.0]
    assert bucket_percentile(BOUNDS, counts, 50) == pytest.approx(0.35)
    assert bucket_percentile(BOUNDS, counts, 100) == 0.5


def test_rounding_carries_it_past_no_bound() -> None:
    counts = counted([0.05] * 3 + [1.5] * 9)
    assert bucket_percentile(BOUNDS, counts, 25) == 0.1


def test_above_every_bound_it_is_the_last() -> None:
    assert bucket_percentile(BOUNDS, [0, 0, 0, 0, 0, 3], 50) == 2.0


def test_nothing_has_no_percentile_and_no_share() -> None:
    assert bucket_percentile(BOUNDS, [0] * 6, 99) is None
    assert share_within(BOUNDS, [0] * 6, 1.0) is None


@given(VALUES)
def test_the_share_at_a_bound_is_exact(values: list[float]) -> None:
    for bound in BOUNDS:
        exact = sum(value <= bound for value in values) / len(values)
        assert share_within(BOUNDS, counted(values), bound) == pytest.approx(exact)


def test_the_share_between_bounds_is_interpolated() -> None:
    assert share_within(BOUNDS, [0, 0, 0, 2, 0, 2], 0.75) == pytest.approx(0.25)
    assert share_within(BOUNDS, [1, 0, 0, 0, 0, 1], 99.0) == pytest.approx(0.5)


def test_counts_must_fit_the_bounds() -> None:
    with pytest.raises(ValueError, match="5 bounds need 6 counts, not 5"):
        bucket_percentile(BOUNDS, [1] * 5, 50)
    with pytest.raises(ValueError, match="q must be between"):
        bucket_percentile(BOUNDS, [1] * 6, 101)


def test_many_values_come_close_to_the_exact_percentile() -> None:
    values = [n / 1000 for n in range(2000)]
    found, exact = bucket_percentile(BOUNDS, counted(values), 99), percentile(values, 99)
    assert found == pytest.approx(exact, rel=0.01)
