"""The curve an operator picks from: what offline work gets of the bound, over chat's slowdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from conserve.bench.arms import DEFAULT, known_arm
from conserve.bench.report.figures import RATIOS, ArmFigures, Figures, Spread, figures_of
from conserve.bench.report.style import INK, picture
from conserve.bench.store import ResultFolder
from conserve.metrics import RunSummary
from conserve.sim.arms import BOUND, ONLINE_ONLY
from conserve.workload import WHOLE

SIMULATED = "simulated"
"""A folder of this name in a result's folder holds what `conserve sim run --out` gave of the same
scenario; it is drawn beside the measured curve."""
SHARE = "offline_tps_over_bound"
PANELS = (
    ("Time to first token", {"P50": "ttft_p50_over_alone", "P99": "ttft_p99_over_alone"}),
    ("Time between tokens", {"P50": "tbt_p50_over_alone", "P99": "tbt_p99_over_alone"}),
)
"""Title of each panel, and its lines by the figure that they show."""
COLOURS = {"P50": "#0072b2", "P99": "#d55e00"}
LEAST_SPAN = 1.5
"""A panel reaches to this slowdown at least, so that none looks large that is not."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One setting: its name, offline work's share of the bound, and chat's slowdowns by figure."""

    name: str
    share: Spread
    slowdowns: Mapping[str, Spread]
    is_default: bool = False


@dataclass(frozen=True, slots=True)
class Curve:
    """Its points, those that harvest least first."""

    points: Sequence[CurvePoint]
    simulated: bool = False

    @classmethod
    def of(cls, arms: Mapping[str, ArmFigures], *, simulated: bool = False) -> Curve:
        """Of the arms that are on it and whose ratios are known."""
        points = sorted(_points(arms), key=lambda point: point.share.median)
        return cls(points, simulated)

    def lines(self) -> Iterator[str]:
        """Each point in words."""
        for point in self.points:
            parts = [
                f"{'TTFT' if ratio.startswith('ttft') else 'TBT'} {name} {spread.median:.2f}x"
                for _, lines in PANELS
                for name, ratio in lines.items()
                if (spread := point.slowdowns.get(ratio))
            ]
            share = f"offline {point.share.median:.0%} of first come first served"
            yield f"{point.name}: chat at {', '.join(parts)} of alone, {share}"

    @classmethod
    def of_summaries(cls, arms: Mapping[str, RunSummary]) -> Curve:
        """The same of one simulated run each; among them must be chat alone and the bound."""
        over = {"alone": arms[ONLINE_ONLY], "bound": arms[BOUND]}
        found: dict[str, ArmFigures] = {}
        for arm, summary in arms.items():
            found[arm] = {}
            for ratio in RATIOS:
                above = getattr(summary, ratio.metric)
                below = getattr(over.get(ratio.over), ratio.metric, None)
                if below and above is not None and (spread := Spread.of([above / below])):
                    found[arm][ratio.name] = spread
        return cls.of(found, simulated=True)


def _points(arms: Mapping[str, ArmFigures]) -> Iterator[CurvePoint]:
    for arm, figures in arms.items():
        name = known_arm(arm).on_curve
        slowdowns = {
            ratio: figures[ratio]
            for _, lines in PANELS
            for ratio in lines.values()
            if ratio in figures
        }
        if name and SHARE in figures and slowdowns:
            yield CurvePoint(name, figures[SHARE], slowdowns, arm == DEFAULT)


def curves_of(folder: ResultFolder, figures: Figures, point: str = WHOLE) -> list[Curve]:
    """The folder's own curve at one point of its sweep, and the simulated one that lies in it.

    Raises ResultError for a `simulated` folder that holds no result.
    """
    is_simulated = "simulated" in folder.description().machine
    found = [Curve.of(figures.points.get(point, {}), simulated=is_simulated)]
    inner = ResultFolder(folder.path / SIMULATED)
    if inner.path.is_dir():
        found.append(Curve.of(figures_of(inner).points.get(point, {}), simulated=True))
    return [curve for curve in found if curve.points]


def draw_curves(path: Path, curves: Sequence[Curve]) -> bool:
    """Write the picture; False: there are fewer than two points to draw."""
    if max((len(curve.points) for curve in curves), default=0) < 2:
        return False
    with picture(path, 9.6, 4.4) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (title, lines) in zip(panels, PANELS, strict=True):
            for curve in curves:
                for name, ratio in lines.items():
                    _line(axes, curve, name, ratio)
            _dress(axes, title, curves, lines.values())
        # In the other panel, where the points hardly differ, names would lie on each other.
        _names(panels[1], curves[0], PANELS[1][1]["P50"])
        panels[0].set_ylabel("offline tokens, share of first come first served")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return True


def _line(axes: Axes, curve: Curve, name: str, ratio: str) -> None:
    there = [point for point in curve.points if ratio in point.slowdowns]
    if not there:
        return
    colour, simulated = COLOURS[name], curve.simulated
    axes.errorbar(
        [point.slowdowns[ratio].median for point in there],
        [point.share.median for point in there],
        xerr=_bars([point.slowdowns[ratio] for point in there]),
        yerr=_bars([point.share for point in there]),
        color=colour,
        linestyle=(0, (4, 3)) if simulated else "-",
        marker="o",
        markersize=5,
        markerfacecolor="white" if simulated else colour,
        elinewidth=0.8,
        linewidth=1.6,
        label=f"{name}, {'simulated' if simulated else 'measured'}",
    )
    for point in there:
        place = (point.slowdowns[ratio].median, point.share.median)
        if point.is_default:
            axes.plot(*place, "o", markersize=11, markerfacecolor="none", color=INK, zorder=4)


def _bars(spreads: Sequence[Spread]) -> list[list[float]]:
    return [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]


def _names(axes: Axes, curve: Curve, ratio: str) -> None:
    """Once, above and left of the line that rises to the right."""
    for point in curve.points:
        if ratio in point.slowdowns:
            axes.annotate(
                point.name,
                (point.slowdowns[ratio].median, point.share.median),
                xytext=(-7, 4),
                textcoords="offset points",
                ha="right",
                fontsize=7.5,
                color=INK,
                fontweight="bold" if point.is_default else "normal",
                path_effects=[withStroke(linewidth=3, foreground="white")],  # over other lines
                zorder=6,
            )


def _dress(axes: Axes, title: str, curves: Sequence[Curve], ratios: Iterable[str]) -> None:
    shown = set(ratios)
    ends = [
        spread.high
        for curve in curves
        for point in curve.points
        for ratio, spread in point.slowdowns.items()
        if ratio in shown
    ]
    most = max([LEAST_SPAN, *ends])
    axes.set_title(title)
    axes.set_xlabel("times as long as alone")
    axes.set_xscale("log")
    axes.set_xlim(0.9, most**1.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.axhline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_ylim(0, max(1.06, axes.get_ylim()[1]))
