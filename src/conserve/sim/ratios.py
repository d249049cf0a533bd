"""Each arm of a study beside chat alone and beside first come first served; typical users first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from conserve.metrics import median
from conserve.sim.arms import BOUND, ONLINE_ONLY
from conserve.sim.study import Cell, by_arm

OVER: Mapping[str, tuple[str, str]] = {
    "ttft_p50_s": ("TTFT p50", ONLINE_ONLY),
    "tbt_p50_s": ("TBT p50", ONLINE_ONLY),
    "tbt_mean_s": ("TBT mean", ONLINE_ONLY),
    "ttft_p99_s": ("TTFT p99", ONLINE_ONLY),
    "tbt_p99_s": ("TBT p99", ONLINE_ONLY),
    "offline_tps": ("offline tok/s", BOUND),
}
"""Field of RunSummary -> heading, and the arm that it is over."""
SAID = ("says: TBT mean", "says: offline")


def ratio_rows(cells: Sequence[Cell]) -> list[list[str]]:
    """A header and a row for each (point, arm) with anything to compare: medians over seeds, "-"
    where there is nothing. The last two columns are what the policy says of itself."""
    rows = [["point", "arm", *(f"{name}, of {arm}" for name, arm in OVER.values()), *SAID]]
    by_place = {(cell.point, cell.arm, cell.seed): cell for cell in cells}
    for (point, arm), chosen in by_arm(cells).items():
        told = [
            _middle(_ratio(cell, name, over, by_place) for cell in chosen)
            for name, (_, over) in OVER.items()
        ]
        if any(text != "-" for text in told):
            says = ([c.says_slowdown for c in chosen], [c.says_share for c in chosen])
            rows.append([point, arm, *told, *map(_middle, says)])
    return rows


def _ratio(
    cell: Cell, name: str, over: str, by_place: Mapping[tuple[str, str, int], Cell]
) -> float | None:
    other = by_place.get((cell.point, over, cell.seed))
    if other is None or cell.arm == over:
        return None
    above, below = getattr(cell.summary, name), getattr(other.summary, name)
    return above / below if below and above else None


def _middle(values: Iterable[float | None]) -> str:
    middle = median(values)
    return "-" if middle is None else f"{middle:.2f}"
