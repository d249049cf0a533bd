"""Percentiles and shares from the counts of a histogram's buckets."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


def bucket_percentile(bounds: Sequence[float], counts: Sequence[float], q: float) -> float | None:
    """The q-th percentile (0 <= q <= 100), by linear interpolation inside its bucket.

    bounds: upper bounds, rising, each part of its bucket; the first bucket begins at 0.
    counts: observations in each bucket, and last those above every bound: one more than bounds.

    As Prometheus's `histogram_quantile` has it: a percentile above every bound is the last bound.
    None when there are no observations: absence is not zero.
    """
    if not 0 <= q <= 100:
        raise ValueError(f"q must be between 0 and 100, not {q}")
    _check(bounds, counts)
    total = sum(counts)
    if not total:
        return None
    rank, before, lower = total * q / 100, 0.0, 0.0
    for upper, count in zip(bounds, counts, strict=False):
        if count and before + count >= rank:
            # Rounding may carry it a hair past the bound.
            return min(lower + (upper - lower) * (rank - before) / count, upper)
        before, lower = before + count, upper
    return bounds[-1]


def share_within(bounds: Sequence[float], counts: Sequence[float], limit: float) -> float | None:
    """Share of the observations that are at most `limit`; None when there are none.

    Exact where `limit` is one of the bounds, else interpolated inside its bucket.
    """
    _check(bounds, counts)
    total = sum(counts)
    if not total:
        return None
    index = bisect_left(bounds, limit)
    within = sum(counts[:index])
    if index < len(bounds):
        lower = bounds[index - 1] if index else 0.0
        within += counts[index] * (limit - lower) / (bounds[index] - lower)
    return within / total


def _check(bounds: Sequence[float], counts: Sequence[float]) -> None:
    if len(counts) != len(bounds) + 1:
        raise ValueError(f"{len(bounds)} bounds need {len(bounds) + 1} counts, not {len(counts)}")
