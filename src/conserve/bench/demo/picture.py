"""The demo's picture: offline work fills the valleys between bursts, and chat stays quick."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, wherever this runs

import matplotlib.pyplot as plt

from conserve.bench.demo.client import Seen
from conserve.bench.demo.conditions import Conditions
from conserve.bench.demo.figures import Period, Results
from conserve.bench.demo.screen import rates

ONLINE, OFFLINE, INK, FAINT = "#2563eb", "#f59e0b", "#1f2937", "#9ca3af"
WARNING = "#b91c1c"
LINE = 0.035
"""Of the height, for one line under the axes."""
LINE_LENGTH = 150
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
}


def draw(results: Results, seen: Seen, periods: tuple[Period, Period]) -> None:
    """Write the picture to results.picture."""
    zero_s = periods[0].start_s
    with plt.rc_context(STYLE):
        figure, (flow, latency) = plt.subplots(
            2,
            1,
            figsize=(10.5, 6.2),
            sharex=True,
            height_ratios=(2.2, 1),
            layout="constrained",
        )
        _draw_flow(flow, seen, zero_s)
        _draw_latency(latency, seen, zero_s, results.conditions.plan.ttft_target_s)
        for axes in (flow, latency):
            _mark_periods(axes, periods, zero_s)
        for period, shown in zip(periods, (results.alone, results.together), strict=True):
            start_s = period.start_s - zero_s
            rate = f"{shown.total_tps:,.0f} tokens/s, {shown.num_chats} chats"
            _label(flow, start_s, shown.name, "bold", line=0)
            _label(flow, start_s, rate, "normal", line=1)
            p50, p99 = (f"{1000 * s:,.0f} ms" for s in (shown.ttft_p50_s, shown.ttft_p99_s))
            _label(latency, start_s, f"median {p50}, P99 {p99}", "normal", line=0)
        ratio = results.together.total_tps / results.alone.total_tps
        figure.suptitle(
            f"The idle time of a chat server, put to work: {ratio:.1f} times the tokens",
            fontsize=14,
            fontweight="bold",
            x=0.01,
            ha="left",
        )
        _say_conditions(figure, results.conditions)
        figure.savefig(results.picture, dpi=160)
        plt.close(figure)


def _say_conditions(figure: Any, conditions: Conditions) -> None:
    """Under everything: the scale, and what disturbed it."""
    scale = conditions.scale_in_words()
    shown = [(f"{scale[0].upper()}{scale[1:]}.", INK)]
    shown += [(line, WARNING) for line in wrap(conditions.disturbance(), LINE_LENGTH)]
    room = LINE * len(shown)
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
    for index, (text, colour) in enumerate(shown, 1):
        figure.text(0.01, room - LINE * index + 0.01, text, fontsize=9, color=colour)


def _draw_flow(axes: Any, seen: Seen, zero_s: float) -> None:
    """Tokens a second, online below, offline on top."""
    online, offline = rates(seen.samples)
    edges = [sample.at_s - zero_s for sample in seen.samples]
    total = [a + b for a, b in zip(online, offline, strict=True)]
    axes.stairs(total, edges, baseline=0, fill=True, color=OFFLINE, label="offline: summaries")
    axes.stairs(online, edges, baseline=0, fill=True, color=ONLINE, label="online: chat")
    axes.set_ylabel("tokens a second")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(0, 1.3 * max([*total, 1.0]))
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.86), frameon=False, reverse=True)


def _draw_latency(axes: Any, seen: Seen, zero_s: float, target_s: float) -> None:
    """Each chat's time to first token, at the moment it came."""
    points = [(r.arrival_s - zero_s, r.ttft_s) for r in seen.records if r.online and r.ttft_s]
    axes.scatter(*zip(*points, strict=True), s=16, color=ONLINE, alpha=0.75, linewidths=0)
    axes.axhline(target_s, color=INK, linestyle=(0, (4, 3)), linewidth=1)
    axes.annotate(
        "target",
        (1.0, target_s),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
    )
    axes.set_ylim(0, max(target_s * 1.6, *(1.08 * ttft for _, ttft in points)))
    axes.set_ylabel("first token of\neach chat (s)")
    axes.set_xlabel("seconds")


def _mark_periods(axes: Any, periods: tuple[Period, Period], zero_s: float) -> None:
    alone, together = periods
    axes.axvline(together.start_s - zero_s, color=FAINT, linewidth=1)
    axes.set_xlim(alone.start_s - zero_s, together.end_s - zero_s)


def _label(axes: Any, start_s: float, text: str, weight: str, line: int) -> None:
    """A line of text at the top left of what begins at `start_s`."""
    axes.annotate(
        text,
        (start_s, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(7, -3 - 16 * line),
        textcoords="offset points",
        va="top",
        fontweight=weight,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    ).set_in_layout(False)
