from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve.metrics import bucket_percentile, median, percentile

finite = st.floats(-1e6, 1e6)


def test_known_values() -> None:
    assert percentile([4, 1, 3, 2], 0) == 1
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([4, 1, 3, 2], 100) == 4
    assert percentile([1, 2, 3, 4, 5], 90) == pytest.approx(4.6)
    assert median([7]) == 7


def test_no_values_is_not_zero() -> None:
    assert percentile([], 50) is None


@pytest.mark.parametrize("q", [-1, 100.1, float("nan")])
def test_refuses_a_q_out_of_range(q: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1.0], q)


@given(st.lists(finite, min_size=1, max_size=50), st.floats(0, 100))
def test_agrees_with_numpy(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), abs=1e-6)


@given(st.lists(finite, min_size=1, max_size=30), st.floats(0, 100), st.floats(0, 100))
def test_monotone_in_q_and_within_range(values: list[float], a: float, b: float) -> None:
    low, high = percentile(values, min(a, b)), percentile(values, max(a, b))
    assert low is not None
    assert high is not None
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - slack <= low <= high + slack
    assert high <= max(values) + slack


INF = float("inf")


def test_of_buckets_by_hand() -> None:
    assert bucket_percentile({1.0: 0, 2.0: 4, INF: 4}, 50) == 1.5
    assert bucket_percentile({0.0: 3, 2.0: 4, INF: 4}, 50) == 0.0
    assert bucket_percentile({1.0: 1, INF: 10}, 99) == 1.0, "no bound is known above"


def test_of_empty_buckets_is_not_zero() -> None:
    assert bucket_percentile({}, 50) is None
    assert bucket_percentile({1.0: 0, INF: 0}, 50) is None


def test_of_buckets_refuses_a_q_out_of_range() -> None:
    with pytest.raises(ValueError, match="between 0 and 100"):
        bucket_percentile({1.0: 1}, 101)


@given(st.lists(st.floats(0, 4.9), min_size=1, max_size=40), st.floats(1, 99))
def test_of_buckets_is_never_a_bucket_off(values: list[float], q: float) -> None:
    """Whatever lies where in a bucket, the rank's own value is in the same bucket."""
    bounds = [1.0, 2.0, 3.0, 4.0, 5.0, INF]
    cumulative = {bound: sum(v <= bound for v in values) for bound in bounds}
    found = bucket_percentile(cumulative, q)
    assert found is not None
    at_rank = sorted(values)[max(0, int(np.ceil(len(values) * q / 100 - 1e-9)) - 1)]
    assert found - 1 - 1e-6 <= at_rank <= found + 1 + 1e-6
