"""Real runs and simulated ones of the same workloads, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conserve.metrics import RequestRecord, RunSummary, median, summarise
from conserve.sim.arms import ARMS
from conserve.sim.profiles import Profile
from conserve.sim.run import simulate
from conserve.workload import Scenario, build_workload

COMPARED = {
    "ttft_p50_s": "TTFT p50 ms",
    "ttft_p99_s": "TTFT p99 ms",
    "tbt_p50_s": "TBT p50 ms",
    "tbt_p99_s": "TBT p99 ms",
    "offline_tps": "offline tok/s",
    "offline_output_tps": "offline output tok/s",
    "online_hit_ratio": "chats' tokens found %",
    "offline_hit_ratio": "offline tokens found %",
}
"""Field of RunSummary -> heading; seconds are shown as milliseconds, shares in per cent."""
SHARES = ("online_hit_ratio", "offline_hit_ratio")
"""Figures whose error is a difference, in points."""


@dataclass(frozen=True, slots=True)
class RealRun:
    """One stored run of the real benchmark."""

    point: str
    arm: str
    seed: int
    records: list[RequestRecord]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of one arm: medians over seeds, and the simulator's error."""

    point: str
    arm: str
    figure: str
    real: float
    simulated: float
    real_range: tuple[float, float]
    """The smallest and the largest over seeds: no simulator can be nearer than the runs are to
    each other."""

    @property
    def error(self) -> float:
        """(simulated - real) / real; of a share simulated - real."""
        off = self.simulated - self.real
        return off if self.is_share else off / self.real

    @property
    def is_share(self) -> bool:
        return self.figure in SHARES


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
    places = scenario.places()
    for run in (run for run in real if run.arm in ARMS):
        at = places[run.point]
        targets, workload = at.targets.targets(), build_workload(at, run.seed, traces)
        outcome = simulate(
            workload,
            ARMS[run.arm],
            profile,
            targets,
            at.window,
            seed=run.seed,
            async_scheduling=async_scheduling,
        )
        there, here = (summarise(r, at.duration_s, targets) for r in (run.records, outcome.records))
        pairs.setdefault((run.point, run.arm), []).append((there, here))
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
        known = [v for v in (getattr(real, figure) for real, _ in summaries) if v is not None]
        real = median(known)
        simulated = median(getattr(simulated, figure) for _, simulated in summaries)
        # A class that the arm is not sent has no figure, or a rate of zero.
        told = (real or simulated) if figure in SHARES else real
        if told and real is not None and simulated is not None:
            yield Comparison(point, arm, figure, real, simulated, (min(known), max(known)))


AIM = 0.15
"""Relative error that the simulator is meant to stay within."""
AIM_OF_SHARES = 0.05
"""Of shares: 5 points."""


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A row for each point and arm; times in milliseconds, shares in per cent.

    A cell has the real median (its range over seeds) → the simulated one, and the error.
    """
    figures = [figure for figure in COMPARED if any(c.figure == figure for c in comparisons)]
    lines = [
        f"| {' | '.join(['point', 'arm', *(COMPARED[figure] for figure in figures)])} |",
        f"|{'---|' * (len(figures) + 2)}",
    ]
    cells = {(c.point, c.arm, c.figure): _cell(c) for c in comparisons}
    for point, arm in dict.fromkeys((c.point, c.arm) for c in comparisons):
        row = [cells.get((point, arm, figure), "-") for figure in figures]
        lines.append(f"| {' | '.join([point, arm, *row])} |")
    lines += ["", *_verdict(comparisons)]
    return "\n".join(lines) + "\n"


def _verdict(comparisons: Sequence[Comparison]) -> Iterable[str]:
    errors = [abs(c.error) for c in comparisons if not c.is_share]
    if errors:
        within = sum(error <= AIM for error in errors)
        yield (
            f"{within} of {len(errors)} figures are within {AIM:.0%}; "
            f"the mean error is {sum(errors) / len(errors):.0%}, the largest {max(errors):.0%}."
        )
    points = [abs(c.error) for c in comparisons if c.is_share]
    if points:
        within = sum(error <= AIM_OF_SHARES for error in points)
        yield (
            f"{within} of {len(points)} shares of tokens found are within "
            f"{AIM_OF_SHARES * 100:.0f} points; the largest error is {max(points) * 100:.1f}."
        )


def _cell(one: Comparison) -> str:
    factor = 1e2 if one.is_share else 1e3 if one.figure.endswith("_s") else 1.0
    real, low, high, simulated = (
        _short(value * factor) for value in (one.real, *one.real_range, one.simulated)
    )
    spread = "" if low == high else f" ({low} to {high})"
    error = f"{one.error * 100:+.1f}" if one.is_share else f"{one.error:+.0%}"
    return f"{real}{spread} → {simulated}, {error}"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
