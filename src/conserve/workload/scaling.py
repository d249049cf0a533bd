"""Public traces were recorded on large machines: how they are made to fit this one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from .trace_columns import Ints, Trace, TraceRow, chosen
from .traces import RatePoint


@dataclass(frozen=True, slots=True)
class Scale:
    """What a trace was multiplied by. Every factor is above 0; 1.0 leaves the trace as it is.

    time: seconds of the run for one second of the trace.
    prompt, output: tokens of a request here for one token in the trace.
    num_failed: requests of the trace that got no answer, and are left out.
    """

    trace: str
    time: float = 1.0
    prompt: float = 1.0
    output: float = 1.0
    num_failed: int = 0

    def __str__(self) -> str:
        failed = f", {self.num_failed:,} failed requests left out" if self.num_failed else ""
        return (
            f"{self.trace}: time x {self.time:.4g}, prompts x {self.prompt:.4g}, "
            f"outputs x {self.output:.4g}{failed}"
        )


def length_factor(lengths: Sequence[int] | Ints, mean_tokens: float) -> float:
    """The factor that gives these lengths the wanted mean (before any maximum cuts them)."""
    return mean_tokens * len(lengths) / int(np.sum(lengths, dtype=np.int64))


def scaled_length(num_tokens: int, factor: float, max_tokens: int) -> int:
    """At least one token, at most `max_tokens`; order is kept."""
    return min(max(round(num_tokens * factor), 1), max_tokens)


def time_factor(rows: Sequence[TraceRow], rate_rps: float) -> float:
    """The stretch that turns the trace's mean rate into `rate_rps`. Raises ValueError."""
    if len(rows) < 2 or rows[-1].arrival_s <= rows[0].arrival_s:
        raise ValueError("a trace needs two requests at different times to be scaled")
    return (len(rows) - 1) / (rows[-1].arrival_s - rows[0].arrival_s) / rate_rps


def thinned(trace: Trace, keep_share: float, rng: Random) -> Trace:
    """The rows of that share of the conversations, which `rng` draws.

    Rows are of one conversation if their second block of tokens is the same: the first is a
    system prompt that most have. A row without blocks is a conversation of its own. Raises
    ValueError where next to nothing is left.
    """
    kept: dict[int, bool] = {}

    def keeps(prefix_ids: tuple[int, ...]) -> bool:
        if not prefix_ids:
            return rng.random() < keep_share
        name = prefix_ids[:2][-1]
        if name not in kept:
            kept[name] = rng.random() < keep_share
        return kept[name]

    keep = np.fromiter((keeps(row.prefix_ids) for row in trace), dtype=np.bool_, count=len(trace))
    rows = np.flatnonzero(keep)
    if len(rows) < 2:
        left = f"leaves {len(rows)} of the trace's {len(trace):,} requests"
        raise ValueError(f"keep_share {keep_share:g} {left}: raise it")
    return chosen(trace, rows)


def window(rows: Sequence[TraceRow], time: float, duration_s: float, rng: Random) -> list[TraceRow]:
    """The rows that fall in a run of `duration_s` at that stretch, from a place `rng` picks.

    `rows` are by arrival. Arrivals come out on the run's clock, in [0, duration_s). Raises
    ValueError when the trace is shorter than the run.
    """
    span_s = rows[-1].arrival_s
    length_s = duration_s / time
    if length_s > span_s:
        raise ValueError(
            f"the trace holds {round(span_s * time, 1):g} s at this rate and the run lasts "
            f"{round(duration_s, 1):g} s: lower duration_s or rate_rps"
        )
    start_s = rng.random() * (span_s - length_s)
    first, end = (
        bisect_left(rows, at_s, key=lambda row: row.arrival_s)
        for at_s in (start_s, start_s + length_s)
    )
    moved = (
        TraceRow(
            (r.arrival_s - start_s) * time, r.num_prompt_tokens, r.num_output_tokens, r.prefix_ids
        )
        for r in rows[first:end]
    )
    return [row for row in moved if row.arrival_s < duration_s]


def squeezed_rates(
    points: Sequence[RatePoint],
    start_s: float,
    seconds: float,
    duration_s: float,
    rate_rps: float,
) -> list[RatePoint]:
    """`seconds` of a rate trace from `start_s`, on a run of `duration_s`, with mean `rate_rps`.

    Raises ValueError when the trace does not cover them or its rates there are all zero.
    """
    step_s = points[-1].start_s - points[-2].start_s if len(points) > 1 else seconds
    end_s = start_s + seconds
    if start_s < points[0].start_s or end_s > points[-1].start_s + step_s:
        raise ValueError(
            f"the trace covers {points[0].start_s:.0f} to {points[-1].start_s + step_s:.0f} s, "
            f"not {start_s:.0f} to {end_s:.0f} s"
        )
    first = max(i for i, point in enumerate(points) if point.start_s <= start_s)
    inside = [point for point in points[first:] if point.start_s < end_s]
    edges = [max(point.start_s, start_s) for point in inside] + [end_s]
    total = sum(p.rate_rps * (b - a) for p, a, b in zip(inside, edges, edges[1:], strict=False))
    if total <= 0:
        raise ValueError(f"the trace has no requests from {start_s:.0f} to {end_s:.0f} s")
    factor = rate_rps * seconds / total
    time = duration_s / seconds
    return [
        RatePoint((edge - start_s) * time, point.rate_rps * factor)
        for point, edge in zip(inside, edges, strict=False)
    ]
