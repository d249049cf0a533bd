"""One definition of a percentile and of the spread between runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping


def percentile(values: Iterable[float], q: float) -> float | None:
    """The q-th percentile (0 <= q <= 100), by linear interpolation between closest ranks.

    With n sorted values x[0..n-1] it is x at the real position (n - 1) * q / 100 (Hyndman and
    Fan's type 7; numpy's default). None when there are no values: absence is not zero.
    """
    if not 0 <= q <= 100:
        raise ValueError(f"q must be between 0 and 100, not {q}")
    ordered = sorted(values)
    if not ordered:
        return None
    position = (len(ordered) - 1) * q / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    weight = position - below
    return ordered[below] + (ordered[above] - ordered[below]) * weight


def median(values: Iterable[float]) -> float | None:
    """The 50th percentile."""
    return percentile(values, 50)


def bucket_percentile(cumulative: Mapping[float, float], q: float) -> float | None:
    """The q-th percentile of a Prometheus histogram: {upper bound: observations up to it}.

    Observations are taken as evenly spread within their bucket, the first one starting at 0, as
    Prometheus' own `histogram_quantile` does; one past the last finite bound is given that
    bound. None when nothing was observed.
    """
    if not 0 <= q <= 100:
        raise ValueError(f"q must be between 0 and 100, not {q}")
    bounds = sorted(cumulative)
    if not bounds or cumulative[bounds[-1]] <= 0:
        return None
    rank = cumulative[bounds[-1]] * q / 100
    low = before = 0.0
    for bound in bounds:
        count = cumulative[bound]
        if count >= rank and count > before:
            if math.isinf(bound):
                return low
            return low + (bound - low) * (rank - before) / (count - before)
        low, before = bound, count
    return low
