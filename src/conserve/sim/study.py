"""A scenario over points, arms and seeds, and the medians of what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conserve.metrics import RequestRecord, RunSummary, median, summarise
from conserve.metrics.first_tokens import Parts
from conserve.sim.arms import Arm, arm_named
from conserve.sim.counters import Counters
from conserve.sim.profiles import Profile
from conserve.sim.run import simulate
from conserve.sim.step import Step
from conserve.sim.supply import ran_out, with_more
from conserve.workload import Scenario, Workload, build_workload


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study."""

    point: str
    arm: str
    seed: int
    summary: RunSummary
    counters: Counters
    records: list[RequestRecord]
    scales: list[str]
    """What each trace was multiplied by."""
    steps: list[Step]
    """Empty unless they were asked for."""
    first_token_parts: list[Parts]
    """What each online first token of the run waited for."""
    says_slowdown: float | None = None
    says_share: float | None = None
    """What the policy says itself of where it stands."""
    num_offline: int = 0
    """Offline requests that there were: those of the scenario, or more where they ran out."""


@dataclass(frozen=True, slots=True)
class Study:
    """What to simulate. `traces`: the file of each name in scenario.trace_names()."""

    scenario: Scenario
    profile: Profile
    traces: Mapping[str, Path]
    async_scheduling: bool = False
    keep_steps: bool = False

    def cells(self) -> Iterator[Cell]:
        """Every run, in the order of points, seeds and arms. Raises ScenarioError, TraceError,
        and ValueError for a request that the machine could never finish."""
        arms = [arm_named(name) for name in self.scenario.arms]
        for point, scenario in self.scenario.places().items():
            for seed in scenario.seeds:
                yield from self._beside(point, scenario, seed, arms)

    def _beside(
        self, point: str, scenario: Scenario, seed: int, arms: Sequence[Arm]
    ) -> Sequence[Cell]:
        """One seed's arms, all with the same offline work, of which none has nothing left."""
        workload = build_workload(scenario, seed, self.traces)
        cells: list[Cell] = []
        for arm in arms:
            cells.append(self._cell(point, scenario, seed, arm, workload))
            if ran_out(scenario, cells[-1].records):
                return self._beside(point, with_more(scenario), seed, arms)
        return cells

    def _cell(
        self, point: str, scenario: Scenario, seed: int, arm: Arm, workload: Workload
    ) -> Cell:
        steps: list[Step] = []
        targets = scenario.targets.targets()
        outcome = simulate(
            workload,
            arm,
            self.profile,
            targets,
            scenario.window,
            seed=seed,
            async_scheduling=self.async_scheduling,
            on_step=steps.append if self.keep_steps else None,
        )
        outcome.counters.check()
        return Cell(
            point,
            arm.name,
            seed,
            summarise(outcome.records, scenario.duration_s, targets),
            outcome.counters,
            outcome.records,
            [str(scale) for scale in workload.scales],
            steps,
            outcome.engine.first_token_parts,
            outcome.chat_slowdown,
            outcome.harvest_share,
            scenario.offline.num_requests if scenario.offline else 0,
        )


def by_arm(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """(point, arm) -> its cells, one a seed."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.point, cell.arm), []).append(cell)
    return found


def median_of(cells: Sequence[Cell], name: str) -> float | None:
    """Median over runs of one field of their summaries; None where no run has it."""
    return median(getattr(cell.summary, name) for cell in cells)


COLUMNS: Mapping[str, tuple[str, float, str]] = {
    "ttft_p50_s": ("TTFT p50 ms", 1e3, ".0f"),
    "ttft_p99_s": ("TTFT p99 ms", 1e3, ".0f"),
    "tbt_p50_s": ("TBT p50 ms", 1e3, ".1f"),
    "tbt_p99_s": ("TBT p99 ms", 1e3, ".1f"),
    "slo_attainment": ("SLO met", 1e2, ".1f"),
    "offline_rps": ("offline req/s", 1.0, ".2f"),
    "offline_tps": ("offline tok/s", 1.0, ".0f"),
    "total_tps": ("total tok/s", 1.0, ".0f"),
    "online_hit_ratio": ("chat found %", 1e2, ".1f"),
    "offline_hit_ratio": ("offline found %", 1e2, ".1f"),
}
"""Field of RunSummary -> heading, factor, format."""
FOUND = ("online_hit_ratio", "offline_hit_ratio")
"""Of prompt tokens in the prefix cache: shown where anything was found."""


def table(cells: Sequence[Cell]) -> list[list[str]]:
    """A header and a row for each (point, arm): medians over seeds, "-" where there is nothing."""
    columns = {
        name: column
        for name, column in COLUMNS.items()
        if name not in FOUND or any(getattr(cell.summary, name) for cell in cells)
    }
    rows = [["point", "arm", *(heading for heading, _, _ in columns.values())]]
    for (point, arm), chosen in by_arm(cells).items():
        row = [point, arm]
        for name, (_, factor, form) in columns.items():
            value = median_of(chosen, name)
            row.append("-" if value is None else format(value * factor, form))
        rows.append(row)
    return rows
