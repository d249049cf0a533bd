"""What first tokens waited for in simulated runs: a line for each arm and part."""

from __future__ import annotations

from collections.abc import Sequence

from conserve.metrics import percentile
from conserve.metrics.first_tokens import Part, Parts
from conserve.sim.study import Cell, by_arm

SLOWEST_SHARE = 0.01
"""Of the first tokens: those around the P99 and behind it."""
HEADINGS = (
    "point", "arm", "waited for",
    "arrivals %", "mean ms", "p99 ms", "of all ms", "of the slowest ms",
)  # fmt: skip
"""Share of the first tokens that waited for it; mean and P99 of theirs; its mean over all, which
sum up to the mean TTFT in the engine; the same over the slowest hundredth."""


def first_token_table(cells: Sequence[Cell]) -> list[list[str]]:
    """A header and a row for each (point, arm, part) that occurred, over all seeds together."""
    rows = [list(HEADINGS)]
    for (point, arm), chosen in by_arm(cells).items():
        everybody = [parts for cell in chosen for parts in cell.first_token_parts]
        rows += [[point, arm, *row] for row in _rows(everybody)]
    return rows


def _rows(everybody: Sequence[Parts]) -> list[list[str]]:
    slowest = sorted(everybody, key=lambda parts: -sum(parts.values()))
    slowest = slowest[: max(1, round(len(everybody) * SLOWEST_SHARE))]
    return [
        _row(part, everybody, slowest) for part in Part if any(part in parts for parts in everybody)
    ]


def _row(part: Part, everybody: Sequence[Parts], slowest: Sequence[Parts]) -> list[str]:
    there = [parts[part] for parts in everybody if part in parts]
    figures = (
        sum(there) / len(there),
        percentile(there, 99) or 0.0,
        sum(there) / len(everybody),
        sum(parts.get(part, 0.0) for parts in slowest) / len(slowest),
    )
    share = f"{100 * len(there) / len(everybody):.1f}"
    return [part.in_words, share, *(f"{1e3 * seconds:.1f}" for seconds in figures)]
