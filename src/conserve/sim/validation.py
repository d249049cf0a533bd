"""Real runs and simulated ones of the same workloads, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conserve.metrics import RequestRecord, RunSummary, median, summarise
from conserve.sim.arms import ARMS, arm_named
from conserve.sim.profiles import Profile
from conserve.sim.run import simulate
from conserve.sim.study import WHOLE, policy_targets, window_of
from conserve.workload import Scenario, build_workload

COMPARED = {
    "ttft_p50_s": "TTFT p50 ms",
    "ttft_p99_s": "TTFT p99 ms",
    "tbt_p50_s": "TBT p50 ms",
    "tbt_p99_s": "TBT p99 ms",
    "offline_tps": "offline tok/s",
    "offline_output_tps": "offline output tok/s",
}
"""Field of RunSummary -> heading; those in seconds are shown in milliseconds."""


@dataclass(frozen=True, slots=True)
class RealRun:
    """One stored run of the real benchmark."""

    point: str
    arm: str
    seed: int
    records: list[RequestRecord]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of one arm: medians over seeds, and the simulator's relative error."""

    point: str
    arm: str
    figure: str
    real: float
    simulated: float

    @property
    def error(self) -> float:
        """(simulated - real) / real."""
        return (self.simulated - self.real) / self.real


def compare(
    scenario: Scenario,
    real: Iterable[RealRun],
    profile: Profile,
    traces: Mapping[str, Path],
    *,
    async_scheduling: bool = False,
) -> list[Comparison]:
    """Simulate every real run of an arm that exists here, with its own seed, and compare.

    Raises ScenarioError, TraceError, and ValueError where no run can be compared.
    """
    pairs: dict[tuple[str, str], list[tuple[RunSummary, RunSummary]]] = {}
    points = {point.name: point for point in scenario.points}
    for run in real:
        if run.arm not in ARMS:
            continue
        at = scenario.at(points.get(run.point) if run.point != WHOLE else None)
        targets = at.targets.targets()
        outcome = simulate(
            build_workload(at, run.seed, traces),
            arm_named(run.arm),
            profile,
            policy_targets(at),
            window_of(at),
            seed=run.seed,
            async_scheduling=async_scheduling,
        )
        pairs.setdefault((run.point, run.arm), []).append(
            (
                summarise(run.records, at.duration_s, targets),
                summarise(outcome.records, at.duration_s, targets),
            )
        )
    if not pairs:
        raise ValueError(f"no stored run is of an arm that is simulated: {', '.join(ARMS)}")
    return [
        comparison
        for (point, arm), summaries in pairs.items()
        for comparison in _compare_arm(point, arm, summaries)
    ]


def _compare_arm(
    point: str, arm: str, summaries: Sequence[tuple[RunSummary, RunSummary]]
) -> Iterable[Comparison]:
    for figure in COMPARED:
        real = _median([getattr(real, figure) for real, _ in summaries])
        simulated = _median([getattr(simulated, figure) for _, simulated in summaries])
        # A class that the arm is not sent has no figure, or a rate of zero.
        if real and simulated is not None:
            yield Comparison(point, arm, figure, real, simulated)


def _median(values: Iterable[float | None]) -> float | None:
    return median([value for value in values if value is not None])


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A table: real, simulated and relative error; seconds as milliseconds."""
    lines = ["| point | arm | figure | real | simulated | error |", "|---|---|---|---|---|---|"]
    for one in comparisons:
        factor = 1e3 if one.figure.endswith("_s") else 1.0
        lines.append(
            f"| {one.point} | {one.arm} | {COMPARED[one.figure]} | {one.real * factor:.4g} "
            f"| {one.simulated * factor:.4g} | {one.error:+.0%} |"
        )
    return "\n".join(lines) + "\n"
