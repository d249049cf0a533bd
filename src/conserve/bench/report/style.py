"""How plots look: one colour an arm on every picture, and the same bytes on every run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#22303c"
FAINT = "#8a97a3"
GRID = "#e3e8ec"

ARM_COLOURS = {
    "online-only": "#6b7780",
    "fcfs": "#d55e00",
    "priority": "#b07aa1",
    "offline-only": "#8c6d46",
    "conserve": "#0072b2",
    "conserve-online-only": "#56b4e9",
}
"""Okabe and Ito's palette where it reaches: told apart without red and green."""

OTHER_COLOURS = ("#009e73", "#cc79a7", "#c4a000", "#7b6fd0", "#3a9c9c", "#a65628")

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "figure.dpi": 140,
    "savefig.facecolor": "white",
}


def colours(arms: Iterable[str]) -> dict[str, str]:
    """A colour for each arm; arms without one of their own share out the rest in order."""
    rest = iter(OTHER_COLOURS * 4)
    return {arm: ARM_COLOURS.get(arm) or next(rest) for arm in arms}


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of that size in inches, written as a PNG that depends on what is drawn alone."""
    with mpl.rc_context(RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        # matplotlib's version is all the metadata there would be.
        figure.savefig(path, format="png", metadata={"Software": None})
