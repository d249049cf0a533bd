"""Tables of figures as rows of text: one place decides units, digits and headings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from conserve.bench.report.figures import (
    HISTORY_RATIOS,
    HITS,
    PREFIX_HITS,
    RATIOS,
    ArmFigures,
    Figures,
    Spread,
)
from conserve.bench.report.first_tokens import part_figure
from conserve.metrics.first_tokens import Part

NOT_MEASURED = "-"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Column:
    """A figure as a column: its name, heading, factor to the unit shown, and digits."""

    name: str
    heading: str
    factor: float = 1.0
    digits: int = 2

    def cell(self, figures: ArmFigures, with_spread: bool = True) -> str:
        spread = figures.get(self.name)
        return NOT_MEASURED if spread is None else self.text(spread, with_spread)

    def text(self, spread: Spread, with_spread: bool) -> str:
        """`0.52`, or `0.52 (0.50 to 0.61)` when seeds differ."""
        middle, low, high = (
            f"{value * self.factor:.{self.digits}f}"
            for value in (spread.median, spread.low, spread.high)
        )
        if not with_spread or spread.num_seeds == 1 or low == high:
            return middle
        return f"{middle} ({low} to {high})"


@dataclass(frozen=True, slots=True)
class Table:
    """headings[0] is the arm's; rows are as long as headings."""

    title: str
    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.headings, ["---", *["---:"] * (len(self.headings) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


LATENCY = (
    Column("ttft_p50_s", "TTFT P50, s"),
    Column("ttft_p90_s", "TTFT P90, s"),
    Column("ttft_p99_s", "TTFT P99, s"),
    Column("tbt_p50_s", "TBT P50, ms", 1000, 0),
    Column("tbt_mean_s", "TBT mean, ms", 1000, 0),
    Column("tbt_p90_s", "TBT P90, ms", 1000, 0),
    Column("tbt_p99_s", "TBT P99, ms", 1000, 0),
)
ATTAINMENT = (
    Column("slo_attainment", "requests within targets, %", 100, 0),
    Column("ttft_attainment", "TTFT within target, %", 100, 0),
    Column("tbt_attainment", "gaps within target, %", 100, 1),
    Column("goodput_rps", "goodput, requests/s"),
    Column("num_online", "online requests", 1, 0),
    Column("num_online_failed", "of them failed", 1, 0),
)
THROUGHPUT = (
    Column("offline_rps", "offline requests/s"),
    Column("offline_prompt_tps", "offline prompt tokens/s", 1, 0),
    Column("offline_output_tps", "offline output tokens/s", 1, 1),
    Column("online_prompt_tps", "online prompt tokens/s", 1, 0),
    Column("online_output_tps", "online output tokens/s", 1, 1),
    Column("total_tps", "total tokens/s", 1, 0),
    Column(PREFIX_HITS, "prefix cache hits, %", 100, 0),
)
KV_COPIES = (
    Column("displaced_requests", "requests displaced", 1, 0),
    Column("displaced_tokens", "tokens they had computed", 1, 0),
    Column("covered_share", "of them on the host, %", 100, 1),
    Column("recomputed_tokens", "tokens recomputed", 1, 0),
    Column("recomputed_share", "of all computed, %", 100, 2),
    Column("restored_tokens", "tokens restored", 1, 0),
    Column("checkpointed_tokens", "tokens copied", 1, 0),
    Column("copied_bytes", "MiB copied", 1 / MIB, 0),
    Column("copied_bytes_per_s", "MiB/s while copying", 1 / MIB, 0),
    Column("copy_wait_s", "wait for copies, ms a displacement", 1000, 2),
)
STOPS = (
    Column("num_stopped_steps", "stops", 1, 0),
    Column("stop_response_p50_s", "response P50, ms", 1000, 0),
    Column("stop_response_p99_s", "response P99, ms", 1000, 0),
    Column("stop_response_p50_layers", "response P50, layers", 1, 1),
    Column("stop_response_p99_layers", "response P99, layers", 1, 1),
    Column("stopped_layers_mean", "layers done, mean", 1, 1),
    Column("num_unstopped_arrivals", "arrivals that needed no stop", 1, 0),
    Column("dropped_share", "tokens dropped, %", 100, 2),
)
PARTS = (
    Column("share", "arrivals, %", 100, 1),
    Column("mean_s", "mean, ms", 1000, 1),
    Column("p99_s", "P99, ms", 1000, 0),
    Column("of_all_s", "of all, ms", 1000, 1),
)
"""Of each part of the time to a first token (`part_figures`)."""
HEADLINE = (
    Column("ttft_p50_s", "TTFT P50, s"),
    Column("tbt_p50_s", "TBT P50, ms", 1000, 0),
    Column("tbt_mean_s", "TBT mean, ms", 1000, 0),
    Column("ttft_p99_s", "TTFT P99, s"),
    Column("tbt_p99_s", "TBT P99, ms", 1000, 0),
    Column("slo_attainment", "within targets, %", 100, 0),
    Column("offline_rps", "offline requests/s"),
    Column("offline_tps", "offline tokens/s", 1, 0),
    Column("total_tps", "total tokens/s", 1, 0),
)


def table(
    title: str, columns: Sequence[Column], arms: dict[str, ArmFigures], with_spread: bool = True
) -> Table:
    """One row an arm; columns that no arm has are left out."""
    used = [column for column in columns if any(column.name in f for f in arms.values())]
    rows = [
        [arm, *(column.cell(figures, with_spread) for column in used)]
        for arm, figures in arms.items()
    ]
    return Table(title, ["arm", *(column.heading for column in used)], rows)


def history_table(figures: Figures, point: str) -> Table | None:
    """What chats found of what they had said before, and what it gave them; None where no server
    told."""
    arms = {arm: f for arm, f in figures.points[point].items() if HITS in f}
    if not arms:
        return None
    hits, forgetful = (Column(r.name, f"{figures.label(r)}, x") for r in HISTORY_RATIOS)
    first = [r for r in RATIOS if r.name in ("ttft_p50_over_alone", "ttft_p99_over_alone")]
    columns = [
        Column(HITS, "chats' prompt tokens found, %", 100, 1),
        hits,
        *(Column(r.name, f"{figures.label(r)}, x") for r in first),
        Column("offline_hit_ratio", "offline prompt tokens found, %", 100, 1),
        Column("offline_tps", "offline tokens/s", 1, 0),
        forgetful,
    ]
    return table("What chats find again", columns, arms)


def ratio_table(figures: Figures, point: str) -> Table:
    """Each arm over online work alone and over the bound."""
    columns = [Column(r.name, f"{figures.label(r)}, x") for r in RATIOS if figures.has_ratio(r)]
    ratios = {r.name for r in RATIOS}
    arms = {arm: f for arm, f in figures.points[point].items() if ratios & set(f)}
    return table("Ratios", columns, arms)


def first_token_table(arms: dict[str, ArmFigures]) -> Table | None:
    """One row for each arm and part that occurred; None where no server told."""
    rows = []
    for arm, figures in arms.items():
        for part in Part:
            share = figures.get(part_figure(part, "share"))
            columns = [replace(one, name=part_figure(part, one.name)) for one in PARTS]
            if share and share.high:
                rows.append([arm, part.in_words, *(column.cell(figures) for column in columns)])
    headings = ["arm", "waited for", *(column.heading for column in PARTS)]
    return Table("First tokens, taken apart", headings, rows) if rows else None


def counter_table(arms: dict[str, ArmFigures]) -> Table | None:
    """What servers counted over the window, one row a counter; None when nothing was."""
    names = dict.fromkeys(name for figures in arms.values() for name in figures if _shown(name))
    rows = []
    for name in names:
        column = Column(name, "", digits=3)
        cells = [column.cell(figures, with_spread=False) for figures in arms.values()]
        if any(cell not in ("0.000", NOT_MEASURED) for cell in cells):
            shown = name.removeprefix("counted:").removeprefix("conserve:").removeprefix("vllm:")
            rows.append([f"`{shown}`", *(_trimmed(cell) for cell in cells)])
    return Table("Counted by the server", ["counter", *arms], rows) if rows else None


def _shown(name: str) -> bool:
    """Counters of ours and vLLM's preemptions; how many wait at this moment tells nothing."""
    ours = name.startswith("counted:conserve:")
    bare = name.partition("{")[0]
    return (ours and bare.endswith(("_total", "_ratio"))) or "vllm:num_preemptions" in bare


def _trimmed(cell: str) -> str:
    return cell.rstrip("0").rstrip(".") if "." in cell else cell
