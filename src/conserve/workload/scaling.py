"""Public traces were recorded on large machines: how they are made to fit this one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from random import Random

from .traces import RatePoint, TraceRow


@dataclass(frozen=True, slots=True)
class Scale:
    """What a trace was multiplied by. Every factor is above 0; 1.0 leaves the trace as it is.

    time: seconds of the run for one second of the trace.
    prompt, output: tokens of a request here for one token in the trace.
    """

    trace: str
    time: float = 1.0
    prompt: float = 1.0
    output: float = 1.0

    def __str__(self) -> str:
        return (
            f"{self.trace}: time x {self.time:.4g}, prompts x {self.prompt:.4g}, "
            f"outputs x {self.output:.4g}"
        )


def length_factor(lengths: Sequence[int], mean_tokens: float) -> float:
    """The factor that gives these lengths the wanted mean (before any maximum cuts them)."""
    return mean_tokens * len(lengths) / sum(lengths)


def scaled_length(num_tokens: int, factor: float, max_tokens: int) -> int:
    """At least one token, at most `max_tokens`; order is kept."""
    return min(max(round(num_tokens * factor), 1), max_tokens)


def time_factor(rows: Sequence[TraceRow], rate_rps: float) -> float:
    """The stretch that turns the trace's mean rate into `rate_rps`. Raises ValueError."""
    span_s = rows[-1].arrival_s - rows[0].arrival_s
    if len(rows) < 2 or span_s <= 0:
        raise ValueError("a trace needs two requests at different times to be scaled")
    return (len(rows) - 1) / span_s / rate_rps


def thinned(rows: Sequence[TraceRow], keep_share: float, rng: Random) -> list[TraceRow]:
    """The rows of that share of the conversations, which `rng` draws.

    Rows are of one conversation if their second block of 512 tokens is the same: the first is a
    system prompt that most have. A row without blocks is a conversation of its own.
    """
    kept: dict[Hashable, bool] = {}
    names = [row.prefix_ids[:2][-1] if row.prefix_ids else f"row-{i}" for i, row in enumerate(rows)]
    for name in names:
        if name not in kept:
            kept[name] = rng.random() < keep_share
    return [row for row, name in zip(rows, names, strict=True) if kept[name]]


def window(rows: Sequence[TraceRow], time: float, duration_s: float, rng: Random) -> list[TraceRow]:
    """The rows that fall in a run of `duration_s` at that stretch, from a place `rng` picks.

    Arrivals come out on the run's clock, in [0, duration_s). Raises ValueError when the trace is
    shorter than the run.
    """
    span_s = rows[-1].arrival_s
    length_s = duration_s / time
    if length_s > span_s:
        raise ValueError(
            f"the trace holds {span_s * time:.0f} s at this rate and the run lasts "
            f"{duration_s:.0f} s: lower duration_s or rate_rps"
        )
    start_s = rng.random() * (span_s - length_s)
    inside = (row for row in rows if start_s <= row.arrival_s < start_s + length_s)
    moved = (
        TraceRow(
            (r.arrival_s - start_s) * time, r.num_prompt_tokens, r.num_output_tokens, r.prefix_ids
        )
        for r in inside
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
