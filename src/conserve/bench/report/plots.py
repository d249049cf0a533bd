"""The pictures of a report. Each function draws one PNG from stored runs and figures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.container import ErrorbarContainer
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from conserve.bench.arms import known_arm
from conserve.bench.report.figures import Figures, Spread
from conserve.bench.report.style import INK, colours, picture
from conserve.bench.store import Run
from conserve.core.snapshot import Targets
from conserve.metrics import RequestRecord, percentile
from conserve.workload import Point

Numbers = npt.NDArray[np.float64]

TAIL = (0.5, 0.1, 0.01, 0.001)
TAIL_NAMES = ("P50", "P90", "P99", "P99.9")
DASHED = (0, (4, 3))


def latency(path: Path, runs: Sequence[Run], targets: Targets) -> bool:
    """TTFT and TBT of online requests as tails on log scales, seeds pooled. False: none there."""
    values: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for run in runs:
        for record in (r for r in run.records if r.online and r.ttft_s is not None):
            assert record.ttft_s is not None
            values[run.key.arm][0].append(record.ttft_s)
            values[run.key.arm][1].extend(record.tbts_s)
    if not values:
        return False
    colour = colours(values)
    with picture(path, 9.6, 4.2) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for side, (title, target_s) in enumerate(
            (("Time to first token", targets.ttft_s), ("Time between tokens", targets.tbt_s))
        ):
            axes = panels[side]
            for arm, both in values.items():
                _tail(axes, both[side], arm, colour[arm])
            _target(axes, target_s)
            axes.set_title(title)
            axes.set_xscale("log")
            everything = [value for one in values.values() for value in one[side]]
            # Tokens of one message are 0 s apart, which a log scale cannot show.
            least, most = percentile(everything, 5) or 1e-3, max(everything, default=1.0)
            axes.set_xlim(max(least / 1.5, 1e-3), max(most, target_s) * 1.3)
            _log_ticks(axes.xaxis)
        panels[0].set_yscale("log")
        panels[0].set_yticks(TAIL, [f"{n}  {t:.3g}" for n, t in zip(TAIL_NAMES, TAIL, strict=True)])
        panels[0].yaxis.set_minor_locator(NullLocator())
        panels[0].set_ylabel("share of values above")
        figure.legend(*_legend(panels[0]), loc="outside lower center", ncols=5)
    return True


def _tail(axes: Axes, values: list[float], arm: str, colour: str) -> None:
    # The largest value has none above it: on a log scale its step ends at half a value.
    ordered = np.maximum(np.sort(np.asarray(values)), 1e-3)
    above = (len(ordered) - np.arange(1, len(ordered) + 1)) / max(len(ordered), 1)
    above[-1:] = 0.5 / max(len(ordered), 1)
    axes.step(ordered, above, where="post", label=arm, color=colour)


def _target(axes: Axes, target_s: float) -> None:
    axes.axvline(target_s, color=INK, linewidth=1, linestyle=DASHED, zorder=1)
    axes.annotate(
        f"target {_seconds(target_s)}",
        (target_s, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, -10),
        textcoords="offset points",
        fontsize=8,
        color=INK,
    )


def _seconds(value: float, _position: int | None = None) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1000:g} ms"


def timeline(path: Path, runs: Sequence[Run], duration_s: float) -> bool:
    """Tokens a second over time, online and offline, arrivals below; one row an arm."""
    if not runs:
        return False
    colour = colours(run.key.arm for run in runs)
    height = 1.35 * len(runs) + 1.2
    with picture(path, 9.6, height) as figure:
        heights = [*([4.0] * len(runs)), 1.1]
        panels = figure.subplots(
            len(runs) + 1, 1, sharex=True, height_ratios=heights, squeeze=False
        )[:, 0]
        times = np.linspace(0.0, duration_s, 400)
        width_s = max(duration_s / 40, 0.5)
        top = 0.0
        for axes, run in zip(panels, runs, strict=False):
            online = _rate([r for r in run.records if r.online], times, width_s)
            offline = _rate([r for r in run.records if not r.online], times, width_s)
            axes.fill_between(times, 0, online, color=INK, alpha=0.75, linewidth=0)
            axes.fill_between(
                times, online, online + offline, color=colour[run.key.arm], alpha=0.55, linewidth=0
            )
            axes.set_title(run.key.arm, color=colour[run.key.arm])
            top = max(top, float(np.max(online + offline)))
        for axes in panels[:-1]:
            axes.set_ylim(0, top * 1.05 or 1)
            axes.set_ylabel("tokens/s")
        _arrivals(panels[-1], runs)
        panels[-1].set_xlim(0, duration_s)
        panels[-1].set_xlabel(
            f"seconds; dark: online tokens, coloured: offline tokens (seed {runs[0].key.seed}, "
            f"prompt and output, smoothed over {2 * width_s:g} s)"
        )
    return True


def _rate(records: Sequence[RequestRecord], times: Numbers, width_s: float) -> Numbers:
    """Tokens a second at `times`, smoothed by a Gaussian; a prompt counts at its first token."""
    tokens = [(t, 1) for r in records for t in r.token_times_s]
    tokens += [(r.token_times_s[0], r.num_prompt_tokens) for r in records if r.token_times_s]
    if not tokens:
        return np.zeros_like(times)
    when, weight = np.asarray(tokens, dtype=float).T
    gaps = (times[:, None] - when[None, :]) / width_s
    kernel = np.exp(-0.5 * gaps**2) / (width_s * np.sqrt(2 * np.pi))
    # Nothing was seen after the run's end: near it only a part of the kernel counts.
    end_s = max(times[-1], when.max())
    seen = [0.5 + 0.5 * math.erf((end_s - t) / width_s / math.sqrt(2)) for t in times]
    rate: Numbers = (kernel @ weight) / np.asarray(seen)
    return rate


def _arrivals(axes: Axes, runs: Sequence[Run]) -> None:
    arrivals = sorted({r.arrival_s for run in runs for r in run.records if r.online})
    axes.vlines(arrivals, 0, 1, color=INK, linewidth=1)
    axes.set_yticks([])
    axes.set_ylim(0, 1)
    axes.set_ylabel("online\narrivals", rotation=0, ha="right", va="center", color=INK)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)


def tradeoff(path: Path, figures: Figures, point: str, targets: Targets) -> bool:
    """Offline tokens a second against the tails of online requests; False: none was offline."""
    arms = figures.points.get(point, {})
    shown = [arm for arm, f in arms.items() if "ttft_p99_s" in f and "tbt_p99_s" in f]
    if not any(arms[arm]["offline_tps"].median for arm in shown):
        return False
    colour = colours(arms)
    with picture(path, 9.6, 4.4) as figure:
        panels = figure.subplots(1, 2)
        sides = (
            ("ttft_p99_s", "TTFT P99", targets.ttft_s),
            ("tbt_p99_s", "TBT P99", targets.tbt_s),
        )
        for axes, (name, title, target_s) in zip(panels, sides, strict=True):
            for arm in shown:
                _mark(axes, arms[arm]["offline_tps"], arms[arm][name], arm, colour[arm])
            axes.axhline(target_s, color=INK, linewidth=1, linestyle=DASHED, zorder=1)
            axes.annotate(
                f"target {_seconds(target_s)}",
                (1.0, target_s),
                (-2, 3),
                fontsize=8,
                ha="right",
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
            )
            axes.set_yscale("log")
            _log_ticks(axes.yaxis)
            axes.margins(x=0.08, y=0.12)
            axes.set_xlabel("offline tokens a second")
            axes.set_title(title)
        figure.legend(*_legend(panels[0]), loc="outside lower center", ncols=5)
    return True


def _mark(axes: Axes, x: Spread, y: Spread, arm: str, colour: str) -> None:
    axes.errorbar(
        x.median,
        y.median,
        xerr=[[x.median - x.low], [x.high - x.median]],
        yerr=[[y.median - y.low], [y.high - y.median]],
        fmt="D" if known_arm(arm).kind == "conserve" else "o",
        markersize=8,
        color=colour,
        elinewidth=1.2,
        label=arm,
    )


def _legend(axes: Axes) -> tuple[list[Any], list[str]]:
    """Handles and labels without their error bars."""
    handles, labels = axes.get_legend_handles_labels()
    return [h[0] if isinstance(h, ErrorbarContainer) else h for h in handles], labels


def _log_ticks(axis: Axis) -> None:
    """A labelled tick at 1, 2 and 5 of each decade; at 1 alone where that would be crowded."""
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < low * 300 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=30))
    axis.set_major_formatter(FuncFormatter(_seconds))
    axis.set_minor_formatter(NullFormatter())


SWEPT = (
    ("ttft_p99_s", "TTFT P99", True),
    ("tbt_p99_s", "TBT P99", True),
    ("offline_tps", "offline tokens/s", False),
)


def sweep(path: Path, figures: Figures, points: Sequence[Point], x_label: str) -> bool:
    """Latency and offline throughput against the sweep's axis; a line style a group."""
    groups = list(dict.fromkeys(point.group for point in points))
    arms = list(dict.fromkeys(arm for named in figures.points.values() for arm in named))
    if len(points) < 2 or not arms:
        return False
    colour, styles = colours(arms), ("-", (0, (5, 2)), (0, (1, 1.5)), "-.")
    with picture(path, 10.8, 3.9) as figure:
        panels = figure.subplots(1, len(SWEPT))
        for axes, (name, title, log) in zip(panels, SWEPT, strict=True):
            for arm in arms:
                for index, group in enumerate(groups):
                    label = f"{arm}, {group}" if group else arm
                    _line(
                        axes,
                        figures,
                        [p for p in points if p.group == group],
                        arm,
                        name,
                        color=colour[arm],
                        linestyle=styles[index % 4],
                        label=label,
                    )
            axes.set_title(title)
            axes.set_xlabel(x_label)
            if log:
                axes.set_yscale("log")
                _log_ticks(axes.yaxis)
            else:
                axes.set_ylim(bottom=0)
        figure.legend(*_legend(panels[0]), loc="outside lower center", ncols=4)
    return True


def _line(
    axes: Axes, figures: Figures, points: Sequence[Point], arm: str, name: str, **look: object
) -> None:
    there = [
        (point.x, figures.points[point.name][arm][name])
        for point in sorted(points, key=lambda p: p.x)
        if name in figures.points.get(point.name, {}).get(arm, {})
    ]
    if not there:
        return
    x = [place for place, _ in there]
    axes.fill_between(
        x,
        [s.low for _, s in there],
        [s.high for _, s in there],
        color=str(look["color"]),
        alpha=0.12,
    )
    axes.plot(x, [s.median for _, s in there], marker="o", markersize=4, **look)  # type: ignore[arg-type]
