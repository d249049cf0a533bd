"""The ConServe paper's experiments in the simulator: records, figures and docs/paper.md's tables.

    python benchmarks/sim_paper.py --trace PATH_OF_AzureLLMInferenceTrace_conv.csv

writes benchmarks/results/sim-paper/figures.json and the plots beside it, and fills in the tables
of docs/paper.md. Without vLLM and without a GPU; about five minutes on one core.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import sim_paper_page as page
import typer
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from conserve.bench.selection import scenario_file
from conserve.core.latency import StepShape
from conserve.core.looks import num_looks
from conserve.sim.profiles import Profile, load_profile
from conserve.sim.study import COLUMNS, Cell, Study, median_of
from conserve.workload import load_scenario

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "sim-paper"
PAGE = ROOT.parent / "docs" / "paper.md"
PAPER_LAYERS = 4
"""From one look for a stop to the next, in the paper's engine."""

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


def main(
    trace: Annotated[Path, typer.Option(help="The Azure conversation trace's CSV.")],
    only: Annotated[str, typer.Option(help="One experiment.")] = "",
) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "figures.json"
    figures: page.Figures = json.loads(file.read_text()) if file.is_file() else {}
    for name, profile in EXPERIMENTS.items():
        if only in ("", name):
            figures[name] = measure(name, profile, trace)
    figures["steps"] = published_steps()
    file.write_text(json.dumps(figures, indent=1) + "\n")
    plot_ladder(figures)
    plot_sweeps(figures)
    page.fill_in(PAGE, figures)


def measure(name: str, profile: str, trace: Path) -> page.Figures:
    scenario = load_scenario(scenario_file(name))
    study = Study(scenario, load_profile(profile), {"azure-conv": trace})
    cells: dict[tuple[str, str], list[Cell]] = {}
    for cell in study.cells():
        # Records are large, and only their summary is used.
        cell.records.clear()
        cells.setdefault((cell.point, cell.arm), []).append(cell)
        print(name, cell.point, cell.arm, cell.seed, flush=True)
    figures: page.Figures = {}
    for (point, arm), runs in cells.items():
        row = {figure: median_of(runs, figure) for figure in FIGURES}
        for counter in COUNTERS:
            values = sorted(getattr(run.counters, counter) for run in runs)
            row[counter] = values[len(values) // 2]
        figures.setdefault(point, {})[arm] = {
            key: None if value is None else round(value, 6) for key, value in row.items()
        }
    return figures


def published_steps() -> page.Figures:
    """The step times that the paper publishes, by the cost models."""
    eight = load_profile("h100/llama-3.1-8b")
    seventy = load_profile("h100x4/llama-3.1-70b")

    def prefill_ms(profile: Profile, num_tokens: int, context: int) -> float:
        shape = StepShape()
        shape.add_prefill(num_tokens, context)
        return round(profile.cost.predict_s(shape) * 1e3, 1)

    looks = num_looks(seventy.machine.num_layers, PAPER_LAYERS)
    looks_s = looks * seventy.machine.safepoint_s
    chunk_s = 2048 * eight.machine.kv_bytes_per_token / eight.machine.link_bytes_per_s
    return {
        "8b_2048_at_0_ms": prefill_ms(eight, 2048, 0),
        "8b_2048_at_40k_ms": prefill_ms(eight, 2048, 40_000),
        "70b_2048_at_0_ms": prefill_ms(seventy, 2048, 0),
        "70b_2048_at_40k_ms": prefill_ms(seventy, 2048, 40_000),
        "70b_4096_at_0_ms": prefill_ms(seventy, 4096, 0),
        "70b_looks_share_of_262_ms": round(looks_s / 0.262, 4),
        "70b_response_in_262_ms": round(262 / looks, 1),
        "8b_chunk_copy_ms": round(chunk_s * 1e3, 2),
    }


def plot_ladder(figures: page.Figures) -> None:
    """The paper's breakdown: each part added to Sarathi-P in turn."""
    rows = figures["paper-8b"]["all"]
    panels = (("ttft_p99_s", "P99 TTFT, ms", 1e3), ("tbt_p99_s", "P99 TBT, ms", 1e3),
              ("offline_tps", "offline tokens/s", 1.0))  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    for axis, (name, title, factor) in zip(axes, panels, strict=True):
        values = [rows[arm][name] * factor for arm in page.LADDER]
        bars = axis.bar(range(len(page.LADDER)), values, color=COLOURS[page.OURS])
        axis.bar_label(bars, fmt="{:.0f}", fontsize=8)
        axis.set_xticks(
            range(len(page.LADDER)), list(page.LADDER.values()), rotation=25, ha="right", fontsize=8
        )
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, "ladder")


COLOURS = {
    "online-only": "#7a7a7a",
    "fcfs": "#c0504d",
    "sarathi-p": "#e0a030",
    page.OURS: "#2a6fbb",
}


def plot_sweeps(figures: page.Figures) -> None:
    for name, figure_name in (("paper-gamma", "gamma"), ("paper-lengths", "lengths")):
        scenario = load_scenario(scenario_file(name))
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


def save(figure: Figure, name: str) -> None:
    # No date and no version in the file: the same figures give the same bytes.
    figure.savefig(RESULTS / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    mpl.use("Agg")
    typer.run(main)
