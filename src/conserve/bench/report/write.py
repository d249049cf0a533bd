"""The report of a result folder: Markdown, one self-contained HTML page, and pictures.

Made from what is stored alone: equal records give equal bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from conserve.bench.arms import known_arm
from conserve.bench.batch_load import LINES_FAILED, LINES_LEFT
from conserve.bench.report import plots
from conserve.bench.report.curve import curves_of, draw_curves
from conserve.bench.report.figures import RATIOS, ArmFigures, Figures, figures_of
from conserve.bench.report.tables import (
    ATTAINMENT,
    HEADLINE,
    KV_COPIES,
    LATENCY,
    STOPS,
    THROUGHPUT,
    Table,
    counter_table,
    first_token_table,
    history_table,
    ratio_table,
    table,
)
from conserve.bench.store import Description, ResultFolder, Run, RunKey
from conserve.workload import WHOLE, Scenario

DRIFT = 1.1
"""A machine whose speed varies by more than this between runs is reported."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One PNG of the folder and the sentence under it."""

    file: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """One point of the sweep, or the whole scenario (its name is then empty)."""

    name: str
    tables: list[Table]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything both formats show."""

    description: Description
    scenario: Scenario
    verdict: list[str]
    notes: list[str]
    sections: list[Section]
    pictures: list[Picture]
    failures: dict[RunKey, str]


def write_report(path: Path) -> Path:
    """Write figures.json, the pictures, report.md and report.html; returns report.md.

    Raises ResultError for a folder that holds no benchmark.
    """
    folder = ResultFolder(path)
    report = _build(folder)
    for name in ("report.md", "report.html"):
        (path / name).write_text(_render(f"{name}.jinja", report, path), encoding="utf-8")
    return path / "report.md"


def _build(folder: ResultFolder) -> Report:
    description = folder.description()
    scenario = description.parsed_scenario()
    runs = list(folder.runs())
    figures = figures_of(folder)
    figures.write(folder.path / "figures.json")
    failures = {key: why for key, why in folder.failures().items() if not folder.has(key)}
    return Report(
        description,
        scenario,
        verdict=list(_verdict(figures)),
        notes=list(_notes(scenario, runs)),
        sections=[
            Section("" if point == WHOLE else point, list(_tables(figures, point)))
            for point in figures.points
        ],
        pictures=list(_pictures(folder, scenario, runs, figures)),
        failures=failures,
    )


def _tables(figures: Figures, point: str) -> Iterator[Table]:
    arms: dict[str, ArmFigures] = figures.points[point]
    yield table("In short", HEADLINE, arms, with_spread=False)
    ratios = ratio_table(figures, point)
    if ratios.rows:
        yield ratios
    if histories := history_table(figures, point):
        yield histories
    yield table("Latency of online requests", LATENCY, arms)
    yield table("Targets", ATTAINMENT, arms)
    yield table("Throughput", THROUGHPUT, arms)
    displaced = {arm: f for arm, f in arms.items() if any(c.name in f for c in KV_COPIES)}
    if displaced:
        yield table("Displacement and KV copies", KV_COPIES, displaced)
    stops = table("Stops within a step", STOPS, arms)
    if len(stops.headings) > 1:
        yield stops
    if first_tokens := first_token_table(arms):
        yield first_tokens
    counted = counter_table(arms)
    if counted:
        yield counted


def _verdict(figures: Figures) -> Iterator[str]:
    """For `conserve`, one sentence a point: every ratio, good or bad."""
    for point, arms in figures.points.items():
        own = arms.get("conserve", {})
        parts = [
            f"{figures.label(ratio)} {own[ratio.name].median:.2f}x"
            for ratio in RATIOS
            if ratio.name in own
        ]
        if parts:
            where = "" if point == WHOLE else f" at {point}"
            yield f"conserve{where}: {', '.join(parts)}."


def _notes(scenario: Scenario, runs: list[Run]) -> Iterator[str]:
    """What a reader must know before believing a figure."""
    if len(scenario.seeds) < 3:
        yield "fewer than three seeds: no spread to judge differences by."
    speeds = _speeds(runs)
    if speeds and max(speeds) > DRIFT * min(speeds):
        yield (
            f"the machine's own speed varied from {min(speeds):.0f} to {max(speeds):.0f} GFLOP/s "
            "between runs (measured before each): smaller differences between arms mean nothing."
        )
    for run in runs:
        offline = [record for record in run.records if not record.online]
        pool = scenario.offline.num_requests if scenario.offline else 0
        if scenario.offline and scenario.offline.in_flight != "all" and len(offline) >= pool:
            yield _ran_out(run)
        if run.counters_end.get(LINES_LEFT) == 0:
            yield _ran_out(run)
        if failed_lines := run.counted(LINES_FAILED):
            yield f"{run.key}: {failed_lines:.0f} lines of the batch failed."
        if failed := [record for record in run.records if record.failed]:
            yield f"{run.key}: {len(failed)} requests failed, the first: {failed[0].error}"


def _speeds(runs: list[Run]) -> list[float]:
    """The machine's speed under each server, in GFLOP/s: of a sweep's points the best, since the
    server may still be busy with what the point before left it."""
    found: dict[tuple[str, int], float] = {}
    for run in runs:
        server = (run.key.arm, run.key.seed)
        found[server] = max(run.probe_gflops, found.get(server, 0.0))
    return list(found.values())


def _ran_out(run: Run) -> str:
    return f"{run.key}: the offline requests ran out; its throughput is a lower bound."


def _pictures(
    folder: ResultFolder, scenario: Scenario, runs: list[Run], figures: Figures
) -> Iterator[Picture]:
    targets = scenario.targets.targets()
    first_point = runs[0].key.point if runs else WHOLE
    at_first = [run for run in runs if run.key.point == first_point]
    seed = min((run.key.seed for run in at_first), default=0)
    # The lines of a batch have no times to draw.
    of_seed = [run for run in at_first if run.key.seed == seed and not known_arm(run.key.arm).batch]
    where = "" if first_point == WHOLE else f" At {first_point}."
    drawn: list[tuple[str, str, Callable[[Path], bool]]] = [
        (
            "curve.png",
            "What offline work gets of first come first served, over how much longer than alone "
            "chat waits: a point for each --chat-slowdown, the default ringed. Left and high is "
            f"better.{where}",
            lambda file: draw_curves(file, curves_of(folder, figures, first_point)),
        ),
        (
            "tradeoff.png",
            "Each arm's offline throughput and the tails of its online requests; bars span the "
            f"seeds. Right and low is better.{where}",
            lambda file: plots.tradeoff(file, figures, first_point, targets),
        ),
        (
            "latency.png",
            "Share of values above each latency, all seeds together: the lower a line falls at a "
            f"given time, the shorter its tail.{where}",
            lambda file: plots.latency(file, at_first, targets),
        ),
        (
            "timeline.png",
            f"Tokens a second over one run, above the arrivals that made them.{where}",
            lambda file: plots.timeline(file, of_seed, scenario.duration_s),
        ),
        (
            "sweep.png",
            "Medians over the sweep; bands span the seeds.",
            lambda file: plots.sweep(file, figures, scenario.points, scenario.x_label),
        ),
    ]
    for file, caption, draw in drawn:
        if draw(folder.path / file):
            yield Picture(file, caption)


def _render(template: str, report: Report, path: Path) -> str:
    def data(file: str) -> str:
        encoded = base64.b64encode((path / file).read_bytes()).decode()
        return f"data:image/png;base64,{encoded}"

    environment = Environment(
        undefined=StrictUndefined,
        autoescape=template.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = (
        files("conserve.bench.report").joinpath("templates", template).read_text(encoding="utf-8")
    )
    return environment.from_string(text).render(report=report, data=data)
