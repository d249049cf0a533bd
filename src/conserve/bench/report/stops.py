"""How quickly steps were stopped and what that cost: figures from a server's own counters."""

from __future__ import annotations

from conserve.bench.report.buckets import buckets_of
from conserve.bench.store import Run
from conserve.metrics import bucket_percentile

PREFIX = "conserve:"


def stop_figures(run: Run) -> dict[str, float | None]:
    """Empty for a server that stops nothing. Response times run from the moment a stop was asked
    for to the end of the stopped step; in layers, from the last safepoint passed by then.

    dropped_share: tokens of stopped steps over all tokens whose forward was begun.
    """
    num_stopped = run.counted(f"{PREFIX}stopped_steps_total")
    if not num_stopped:
        return {}
    figures: dict[str, float | None] = {"num_stopped_steps": num_stopped}
    for unit, ending in (("seconds", "s"), ("layers", "layers")):
        bounds, counts = buckets_of(run, f"{PREFIX}stop_response_{unit}")
        for q in (50, 99):
            figures[f"stop_response_p{q}_{ending}"] = (
                bucket_percentile(bounds, counts, q) if counts else None
            )
    layers = run.counted(f"{PREFIX}stopped_layers_total")
    figures["stopped_layers_mean"] = None if layers is None else layers / num_stopped
    figures["num_unstopped_arrivals"] = run.counted(f"{PREFIX}unstopped_arrivals_total") or 0.0
    dropped = run.counted(f"{PREFIX}dropped_tokens_total") or 0.0
    computed = sum(
        run.counted(name) or 0.0
        for name in run.counters_end
        if name.startswith(f"{PREFIX}computed_tokens_total")
    )
    if begun := computed + dropped:
        figures["dropped_share"] = dropped / begun
    return figures
