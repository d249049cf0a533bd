"""The ConServe paper's experiments in the simulator: records, figures and docs/paper.md's tables.

    python benchmarks/sim_paper.py --trace PATH_OF_AzureLLMInferenceTrace_conv.csv

writes benchmarks/results/sim-paper/figures.json and the plots beside it, and fills in the tables
of docs/paper.md. Without vLLM and without a GPU; about five minutes on one core.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

from conserve.core.latency import StepShape
from conserve.sim.profiles import load_profile
from conserve.sim.study import COLUMNS, Cell, Study, median_of
from conserve.workload import load_scenario

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "sim-paper"
PAGE = ROOT.parent / "docs" / "paper.md"

EXPERIMENTS = {
    "paper-8b": "h100/llama-3.1-8b",
    "paper-14b": "h100/qwen-2.5-14b",
    "paper-70b": "h100x4/llama-3.1-70b",
    "paper-7b": "a100-40/llama-2-7b",
    "paper-gamma": "h100/llama-3.1-8b",
    "paper-lengths": "h100/llama-3.1-8b",
}
FIGURES = (*COLUMNS, "online_prompt_tps", "online_output_tps", "offline_output_tps")
COUNTERS = (
    "num_steps",
    "num_stopped_steps",
    "num_displaced",
    "num_preempted",
    "computed_tokens",
    "recomputed_tokens",
    "dropped_tokens",
    "restored_tokens",
    "prediction_error",
)

Figures = dict[str, Any]
"""experiment -> point -> arm -> figure -> median over seeds."""


def main(
    trace: Annotated[Path, typer.Option(help="The Azure conversation trace's CSV.")],
    only: Annotated[str, typer.Option(help="One experiment.")] = "",
) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "figures.json"
    figures: Figures = json.loads(file.read_text()) if file.is_file() else {}
    for name, profile in EXPERIMENTS.items():
        if only in ("", name):
            figures[name] = measure(name, profile, trace)
    figures["steps"] = published_steps()
    file.write_text(json.dumps(figures, indent=1) + "\n")
    plot_ladder(figures)
    plot_sweeps(figures)
    fill_in(PAGE, figures)


def measure(name: str, profile: str, trace: Path) -> Figures:
    scenario = load_scenario(ROOT / "scenarios" / f"{name}.toml")
    study = Study(scenario, load_profile(profile), {"azure-conv": trace})
    cells: dict[tuple[str, str], list[Cell]] = {}
    for cell in study.cells():
        # Records are large, and only their summary is used.
        cell.records.clear()
        cells.setdefault((cell.point, cell.arm), []).append(cell)
        print(name, cell.point, cell.arm, cell.seed, flush=True)
    figures: Figures = {}
    for (point, arm), runs in cells.items():
        row = {figure: median_of(runs, figure) for figure in FIGURES}
        for counter in COUNTERS:
            values = sorted(getattr(run.counters, counter) for run in runs)
            row[counter] = values[len(values) // 2]
        figures.setdefault(point, {})[arm] = {
            key: None if value is None else round(value, 6) for key, value in row.items()
        }
    return figures


def published_steps() -> Figures:
    """The step times that the paper publishes, by the cost models."""
    eight = load_profile("h100/llama-3.1-8b")
    seventy = load_profile("h100x4/llama-3.1-70b")

    def prefill_ms(profile: Any, num_tokens: int, context: int) -> float:
        shape = StepShape()
        shape.add_prefill(num_tokens, context)
        return round(profile.cost.predict_s(shape) * 1e3, 1)

    looks_s = seventy.machine.num_safepoints * seventy.machine.safepoint_s
    chunk_s = 2048 * eight.machine.kv_bytes_per_token / eight.machine.link_bytes_per_s
    return {
        "8b_2048_at_0_ms": prefill_ms(eight, 2048, 0),
        "8b_2048_at_40k_ms": prefill_ms(eight, 2048, 40_000),
        "70b_2048_at_0_ms": prefill_ms(seventy, 2048, 0),
        "70b_2048_at_40k_ms": prefill_ms(seventy, 2048, 40_000),
        "70b_4096_at_0_ms": prefill_ms(seventy, 4096, 0),
        "70b_looks_share_of_262_ms": round(looks_s / 0.262, 4),
        "70b_response_in_262_ms": round(262 / seventy.machine.num_safepoints, 1),
        "8b_chunk_copy_ms": round(chunk_s * 1e3, 2),
    }


LADDER = {
    "sarathi-p": "Sarathi-P",
    "sarathi-p-targets": "+ steps by targets",
    "sarathi-p-targets-stop": "+ stops inside steps",
    "conserve": "+ checkpoints",
}


def plot_ladder(figures: Figures) -> None:
    """The paper's breakdown: each part added to Sarathi-P in turn."""
    rows = figures["paper-8b"]["all"]
    panels = (("ttft_p99_s", "P99 TTFT, ms", 1e3), ("tbt_p99_s", "P99 TBT, ms", 1e3),
              ("offline_tps", "offline tokens/s", 1.0))  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    for axis, (name, title, factor) in zip(axes, panels, strict=True):
        values = [rows[arm][name] * factor for arm in LADDER]
        bars = axis.bar(range(len(LADDER)), values, color=COLOURS["conserve"])
        axis.bar_label(bars, fmt="{:.0f}", fontsize=8)
        axis.set_xticks(
            range(len(LADDER)), list(LADDER.values()), rotation=25, ha="right", fontsize=8
        )
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, "ladder")


COLOURS = {
    "online-only": "#7a7a7a",
    "fcfs": "#c0504d",
    "sarathi-p": "#e0a030",
    "conserve": "#2a6fbb",
}


def plot_sweeps(figures: Figures) -> None:
    for name, figure_name in (("paper-gamma", "gamma"), ("paper-lengths", "lengths")):
        scenario = load_scenario(ROOT / "scenarios" / f"{name}.toml")
        groups = list(dict.fromkeys(point.group for point in scenario.points))
        panels = (("ttft_p99_s", "P99 TTFT, ms", 1e3), ("tbt_p99_s", "P99 TBT, ms", 1e3),
                  ("offline_tps", "offline tokens/s", 1.0))  # fmt: skip
        size = (3.4 * len(groups), 7.2)
        figure, axes = plt.subplots(
            3, len(groups), figsize=size, squeeze=False, layout="constrained"
        )
        for column, group in enumerate(groups):
            points = [point for point in scenario.points if point.group == group]
            for row, (field, title, factor) in enumerate(panels):
                axis = axes[row][column]
                for arm, colour in COLOURS.items():
                    values = [figures[name][point.name][arm][field] for point in points]
                    if any(values):
                        ys = [None if v is None else v * factor for v in values]
                        axis.plot([p.x for p in points], ys, "o-", ms=3, color=colour, label=arm)
                axis.set_xscale("log")
                axis.set_xticks([p.x for p in points], [f"{p.x:g}" for p in points], fontsize=7)
                axis.xaxis.set_minor_locator(NullLocator())
                if field != "offline_tps":
                    axis.set_yscale("log")
                axis.set_title(f"{group}: {title}", fontsize=9)
                axis.spines[["top", "right"]].set_visible(False)
            axes[2][column].set_xlabel(scenario.x_label, fontsize=8)
        axes[0][0].legend(fontsize=7, frameon=False)
        save(figure, figure_name)


def save(figure: Any, name: str) -> None:
    # No date and no version in the file: the same figures give the same bytes.
    figure.savefig(RESULTS / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def fill_in(page: Path, figures: Figures) -> None:
    """Replace what stands between `<!-- table NAME -->` and `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    for name, lines in tables(figures).items():
        block = "\n".join(["", *lines, ""])
        pattern = rf"(<!-- table {re.escape(name)} -->).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, block=block: m[1] + block + m[2], text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def tables(figures: Figures) -> dict[str, list[str]]:
    """Every table of docs/paper.md, from figures.json alone."""
    built = {name: arms_table(figures[name]["all"]) for name in ("paper-8b", "paper-14b")}
    built |= {name: arms_table(figures[name]["all"]) for name in ("paper-70b", "paper-7b")}
    built["ratios"] = ratios_table(figures)
    built["steps"] = steps_table(figures["steps"])
    built["stops"] = stops_table(figures["paper-gamma"])
    built["gamma"] = sweep_table(figures["paper-gamma"], "gamma arrivals")
    built["lengths"] = sweep_table(figures["paper-lengths"], "offline lengths")
    return built


def arms_table(rows: Figures) -> list[str]:
    headings = [heading for heading, _, _ in COLUMNS.values()]
    lines = [f"| arm | {' | '.join(headings)} | recomputed | stopped steps |"]
    lines.append("|---" * (len(headings) + 3) + "|")
    for arm, row in rows.items():
        values = [
            "-" if row[name] is None else format(row[name] * factor, form)
            for name, (_, factor, form) in COLUMNS.items()
        ]
        recomputed = row["recomputed_tokens"] / max(1, row["computed_tokens"])
        lines.append(
            f"| {arm} | {' | '.join(values)} | {recomputed:.2%} | {row['num_stopped_steps']:.0f} |"
        )
    return lines


def ratio(rows: Figures, over: str, under: str, name: str) -> float:
    return float(rows[over][name] / rows[under][name])


def ratios_table(figures: Figures) -> list[str]:
    """The published ratios beside ours."""
    eight, seven = figures["paper-8b"]["all"], figures["paper-7b"]["all"]
    seventy = figures["paper-70b"]["all"]
    second = [figures[name]["all"] for name in ("paper-8b", "paper-14b", "paper-70b")]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    gains = [ratio(rows, "conserve", "online-only", "total_tps") for rows in second]
    tails = [
        ratio(rows, "sarathi-p", "conserve", name)
        for rows in second
        for name in ("ttft_p99_s", "tbt_p99_s")
    ]
    rows = [
        ("8B, 14B, 70B: throughput over online-only, mean", "2.2x", f"{mean(gains):.1f}x"),
        ("8B, 14B, 70B: P99 TTFT and TBT, Sarathi-P over ours, mean", "2.9x",
         f"{mean(tails):.1f}x"),
        ("70B: P99 TTFT, best baseline over ours", "2.04x",
         f"{ratio(seventy, 'sarathi-p', 'conserve', 'ttft_p99_s'):.2f}x"),
        ("70B: P99 TBT, best baseline over ours", "2.86x",
         f"{ratio(seventy, 'sarathi-p', 'conserve', 'tbt_p99_s'):.2f}x"),
        ("70B: offline, ours over Sarathi-P", "1.74x",
         f"{ratio(seventy, 'conserve', 'sarathi-p', 'offline_tps'):.2f}x"),
        ("70B: offline, ours over the bound", "78 %",
         f"{ratio(seventy, 'conserve', 'fcfs', 'offline_tps'):.0%}"),
        ("8B: offline, ours over the bound", "88 %",
         f"{ratio(eight, 'conserve', 'fcfs', 'offline_tps'):.0%}"),
        ("8B: P99 TBT of Sarathi-P, and with steps by targets", "375 -> 73 ms",
         f"{eight['sarathi-p']['tbt_p99_s'] * 1e3:.0f} -> "
         f"{eight['sarathi-p-targets']['tbt_p99_s'] * 1e3:.0f} ms"),
        ("8B: P99 TTFT, each part added", "1399 -> 686 -> 523 ms",
         " -> ".join(f"{eight[arm]['ttft_p99_s'] * 1e3:.0f}" for arm in LADDER) + " ms"),
        ("8B: offline tok/s, Sarathi-P and ours", "8810 -> 11366",
         f"{eight['sarathi-p']['offline_tps']:.0f} -> {eight['conserve']['offline_tps']:.0f}"),
        ("7B (first version): throughput over online-only", "2.35x",
         f"{ratio(seven, 'conserve', 'online-only', 'total_tps'):.1f}x"),
        ("7B (first version): P99 TTFT, co-serving without it over ours", "84x",
         f"{ratio(seven, 'fcfs', 'conserve', 'ttft_p99_s'):.0f}x"),
    ]  # fmt: skip
    return [
        "| what | paper | simulator |",
        "|---|---|---|",
        *(f"| {a} | {b} | {c} |" for a, b, c in rows),
    ]


def steps_table(steps: Figures) -> list[str]:
    rows = [
        ("8B, 2,048 tokens behind no context", "51 ms", f"{steps['8b_2048_at_0_ms']} ms"),
        ("8B, 2,048 tokens behind 40K", "124 ms", f"{steps['8b_2048_at_40k_ms']} ms"),
        ("70B TP4, a mean step", "262 ms",
         f"{steps['70b_2048_at_0_ms']} ms (2,048 tokens behind nothing) to "
         f"{steps['70b_4096_at_0_ms']} ms (4,096); {steps['70b_2048_at_40k_ms']} ms "
         "(2,048 behind 40K)"),
        ("70B TP4, looks at the signal, share of that step", "1.1 %",
         f"{steps['70b_looks_share_of_262_ms']:.1%}"),
        ("70B TP4, response to a stop, at most", "13 ms",
         f"{steps['70b_response_in_262_ms']} ms"),
        ("8B, copying a 2,048-token chunk to the host", "under 7 ms",
         f"{steps['8b_chunk_copy_ms']} ms"),
    ]  # fmt: skip
    return [
        "| what | paper | cost model |",
        "|---|---|---|",
        *(f"| {a} | {b} | {c} |" for a, b, c in rows),
    ]


def stops_table(points: Figures) -> list[str]:
    """What stops inside a step add at low rates, where there are offline-only steps to stop."""
    lines = [
        "| gamma arrivals | TTFT p50, p99 without stops | with stops | offline tok/s without "
        "| with | stopped steps | dropped tokens |",
        "|---" * 7 + "|",
    ]
    for point in ("cv-1-rate-0.25", "cv-2-rate-0.25", "cv-4-rate-0.25", "cv-4-rate-1"):
        without, stops = (
            points[point][arm] for arm in ("sarathi-p-targets", "sarathi-p-targets-stop")
        )
        times = [
            f"{a['ttft_p50_s'] * 1e3:.0f}, {a['ttft_p99_s'] * 1e3:.0f} ms" for a in (without, stops)
        ]
        rates = [f"{a['offline_tps']:.0f}" for a in (without, stops)]
        dropped = stops["dropped_tokens"] / stops["computed_tokens"]
        lines.append(
            f"| {point} | {times[0]} | {times[1]} | {rates[0]} | {rates[1]} "
            f"| {stops['num_stopped_steps']} | {dropped:.1%} |"
        )
    return lines


def sweep_table(points: Figures, what: str) -> list[str]:
    headings = (
        what, "TTFT p99: online-only", "Sarathi-P", "conserve", "TBT p99: Sarathi-P", "conserve",
        "offline tok/s: bound", "Sarathi-P", "conserve", "over Sarathi-P", "total over online-only",
    )  # fmt: skip
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for point, rows in points.items():
        alone, sarathi, ours = rows["online-only"], rows["sarathi-p"], rows["conserve"]
        values = [point]
        values += [f"{arm['ttft_p99_s'] * 1e3:.0f}" for arm in (alone, sarathi, ours)]
        values += [f"{arm['tbt_p99_s'] * 1e3:.0f}" for arm in (sarathi, ours)]
        values += [f"{arm['offline_tps']:.0f}" for arm in (rows["fcfs"], sarathi, ours)]
        values += [f"{ours['offline_tps'] / sarathi['offline_tps']:.2f}x"]
        values += [f"{ours['total_tps'] / alone['total_tps']:.1f}x"]
        lines.append(f"| {' | '.join(values)} |")
    return lines


if __name__ == "__main__":
    mpl.use("Agg")
    typer.run(main)
