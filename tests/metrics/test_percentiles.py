from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve.metrics import median, percentile

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
