"""One definition of a percentile and of the spread between runs."""

from __future__ import annotations

import math
from collections.abc import Iterable


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


def median(values: Iterable[float | None]) -> float | None:
    """The 50th percentile of those that are there."""
    return percentile((value for value in values if value is not None), 50)
