"""What displacement cost, and what KV copies saved, from the counters of one run's server."""

from __future__ import annotations

from conserve.bench.store import Run


def figures_of_copies(run: Run) -> dict[str, float | None]:
    """Figures named as in `tables.KV_COPIES`; none where nothing was displaced or copied.

    recomputed_share is of the offline tokens computed. copy_wait_s is what stood between the
    need for blocks and their being free, summed over forwards that waited for a copy out of
    blocks about to be overwritten, a displaced request.
    """
    displaced = _sum(run, "displaced_requests_total")
    copied = _sum(run, "copied_bytes_total", "{direction=store}")
    if not displaced and not copied:
        return {}
    computed = _sum(run, "computed_tokens_total", "{class=offline}")
    tokens = _sum(run, "displaced_tokens_total")
    recomputed = _sum(run, "recomputed_tokens_total", "{class=offline}")
    return {
        "displaced_requests": displaced,
        "displaced_tokens": tokens,
        "covered_share": _ratio(_sum(run, "displaced_covered_tokens_total"), tokens),
        "recomputed_tokens": recomputed,
        "recomputed_share": _ratio(recomputed, computed),
        "restored_tokens": _sum(run, "restored_tokens_total"),
        "checkpointed_tokens": _sum(run, "checkpointed_tokens_total"),
        "copied_bytes": copied,
        "copied_bytes_per_s": _ratio(copied, _sum(run, "copy_seconds_total", "{direction=store}")),
        "copy_wait_s": _ratio(_sum(run, "copy_wait_seconds_sum"), displaced),
    }


def _sum(run: Run, name: str, labels: str = "") -> float:
    """How far the series of that name rose, over all labels unless some are given. A series
    that nothing was counted in does not exist yet."""
    return sum(
        run.counted(series) or 0.0
        for series in run.counters_end
        if series.partition("{")[0] == f"conserve:{name}" and series.endswith(labels)
    )


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None
