"""The tables of docs/paper.md, from the stored figures alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from conserve.sim.study import COLUMNS, FOUND

Figures = dict[str, Any]
"""experiment -> point -> arm -> figure -> median over seeds."""

LADDER = {
    "sarathi-p": "Sarathi-P",
    "sarathi-p-targets": "+ steps by targets",
    "sarathi-p-targets-stop": "+ stops inside steps",
    "conserve-greedy": "+ checkpoints",
    "conserve": "+ chat's slowdown bounded",
}
"""The paper's breakdown, and what comes by default: arm -> what it adds to the one before."""
OURS = "conserve-greedy"
"""What harvests as far as the targets allow, as the paper's system does."""


def fill_in(page: Path, figures: Figures) -> None:
    """Replace what stands between `<!-- table NAME -->` and `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    for name, lines in tables(figures).items():
        text = _with_table(text, name, lines)
    page.write_text(text, encoding="utf-8")


def _with_table(text: str, name: str, lines: list[str]) -> str:
    block = "\n".join(["", *lines, ""])
    pattern = rf"(<!-- table {re.escape(name)} -->).*?(<!-- end -->)"
    return re.sub(pattern, lambda marks: marks[1] + block + marks[2], text, flags=re.DOTALL)


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
    # No two of these requests share text. Figures are kept for longer than the simulator has the
    # same ones.
    shown = [name for name in COLUMNS if name not in FOUND]
    columns = {name: COLUMNS[name] for name in shown if all(name in row for row in rows.values())}
    headings = [heading for heading, _, _ in columns.values()]
    lines = [f"| arm | {' | '.join(headings)} | recomputed | stopped steps |"]
    lines.append("|---" * (len(headings) + 3) + "|")
    for arm, row in rows.items():
        values = [
            "-" if row[name] is None else format(row[name] * factor, form)
            for name, (_, factor, form) in columns.items()
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

    gains = [ratio(rows, OURS, "online-only", "total_tps") for rows in second]
    tails = [
        ratio(rows, "sarathi-p", OURS, name)
        for rows in second
        for name in ("ttft_p99_s", "tbt_p99_s")
    ]
    rows = [
        ("8B, 14B, 70B: throughput over online-only, mean", "2.2x", f"{mean(gains):.1f}x"),
        ("8B, 14B, 70B: P99 TTFT and TBT, Sarathi-P over ours, mean", "2.9x",
         f"{mean(tails):.1f}x"),
        ("70B: P99 TTFT, best baseline over ours", "2.04x",
         f"{ratio(seventy, 'sarathi-p', OURS, 'ttft_p99_s'):.2f}x"),
        ("70B: P99 TBT, best baseline over ours", "2.86x",
         f"{ratio(seventy, 'sarathi-p', OURS, 'tbt_p99_s'):.2f}x"),
        ("70B: offline, ours over Sarathi-P", "1.74x",
         f"{ratio(seventy, OURS, 'sarathi-p', 'offline_tps'):.2f}x"),
        ("70B: offline, ours over the bound", "78 %",
         f"{ratio(seventy, OURS, 'fcfs', 'offline_tps'):.0%}"),
        ("8B: offline, ours over the bound", "88 %",
         f"{ratio(eight, OURS, 'fcfs', 'offline_tps'):.0%}"),
        ("8B: P99 TBT of Sarathi-P, and with steps by targets", "375 -> 73 ms",
         f"{eight['sarathi-p']['tbt_p99_s'] * 1e3:.0f} -> "
         f"{eight['sarathi-p-targets']['tbt_p99_s'] * 1e3:.0f} ms"),
        ("8B: P99 TTFT, each part added", "1399 -> 686 -> 523 ms",
         " -> ".join(f"{eight[arm]['ttft_p99_s'] * 1e3:.0f}" for arm in LADDER if arm != "conserve")
         + " ms"),
        ("8B: offline tok/s, Sarathi-P and ours", "8810 -> 11366",
         f"{eight['sarathi-p']['offline_tps']:.0f} -> {eight[OURS]['offline_tps']:.0f}"),
        ("7B (first version): throughput over online-only", "2.35x",
         f"{ratio(seven, OURS, 'online-only', 'total_tps'):.1f}x"),
        ("7B (first version): P99 TTFT, co-serving without it over ours", "84x",
         f"{ratio(seven, 'fcfs', OURS, 'ttft_p99_s'):.0f}x"),
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
        what, "TTFT p99: online-only", "Sarathi-P", OURS, "TBT p99: Sarathi-P", OURS,
        "offline tok/s: bound", "Sarathi-P", OURS, "over Sarathi-P", "total over online-only",
    )  # fmt: skip
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for point, rows in points.items():
        alone, sarathi, ours = rows["online-only"], rows["sarathi-p"], rows[OURS]
        values = [point]
        values += [f"{arm['ttft_p99_s'] * 1e3:.0f}" for arm in (alone, sarathi, ours)]
        values += [f"{arm['tbt_p99_s'] * 1e3:.0f}" for arm in (sarathi, ours)]
        values += [f"{arm['offline_tps']:.0f}" for arm in (rows["fcfs"], sarathi, ours)]
        values += [f"{ours['offline_tps'] / sarathi['offline_tps']:.2f}x"]
        values += [f"{ours['total_tps'] / alone['total_tps']:.1f}x"]
        lines.append(f"| {' | '.join(values)} |")
    return lines
