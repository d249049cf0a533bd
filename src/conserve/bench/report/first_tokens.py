"""What first tokens waited for: figures from a server's own histograms."""

from __future__ import annotations

from conserve.bench.report.buckets import buckets_of
from conserve.bench.store import Run
from conserve.metrics import bucket_percentile
from conserve.metrics.first_tokens import Part

SERIES = "conserve:first_token_part_seconds"
FIRST_TOKENS = "conserve:ttft_seconds_count{class=online}"


def part_figures(run: Run) -> dict[str, float | None]:
    """By `part_figure`; empty for a server that does not tell, or made no first token.

    share: of the first tokens, those that waited for it. mean_s, p99_s: of theirs, None where there
    are none. of_all_s: its mean over all first tokens, which sum up to the mean TTFT in the engine.
    """
    figures: dict[str, float | None] = {}
    num_tokens = run.counted(FIRST_TOKENS)
    for part in Part if num_tokens else ():
        label = f"part={part}"
        count = run.counted(f"{SERIES}_count{{{label}}}")
        if count is None or not num_tokens:
            continue
        seconds = run.counted(f"{SERIES}_sum{{{label}}}") or 0.0
        bounds, counts = buckets_of(run, SERIES, label)
        values = {
            "share": count / num_tokens,
            "mean_s": seconds / count if count else None,
            "p99_s": bucket_percentile(bounds, counts, 99) if counts and seconds else None,
            "of_all_s": seconds / num_tokens,
        }
        figures |= {part_figure(part, name): value for name, value in values.items()}
    return figures


def part_figure(part: Part, name: str) -> str:
    """The name among an arm's figures."""
    return f"part:{part}:{name}"
