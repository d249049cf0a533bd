"""The arms on the load: their ratios beside the paper's and the simulator's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from measured import Folder, simulated

from conserve.bench.store import ResultFolder
from conserve.metrics import RunSummary, summarise
from conserve.sim.arms import arm_named
from conserve.sim.profiles import Profile
from conserve.sim.run import simulate
from conserve.sim.validation import RealRun, compare, markdown
from conserve.workload import Scenario, build_workload

OURS = ("conserve", "conserve-gentle")
ALONE, BOUND = "online-only", "fcfs"
Summaries = Mapping[str, RunSummary]
"""By arm."""


def load_rows(folder: Folder) -> Iterator[tuple[str, str, str, str, str]]:
    results = ResultFolder(folder.path / "load")
    if not (results.path / "run.json").is_file():
        return
    scenario = results.description().parsed_scenario()
    profile = folder.profile or simulated(folder)
    for name, at in scenario.places().items():
        runs = [run for run in results.runs() if run.key.point == name]
        targets = at.targets.targets()
        real = {r.key.arm: summarise(r.records, at.duration_s, targets) for r in runs}
        pretended = {arm: _simulated(at, arm, profile) for arm in real}
        for arm in OURS:
            if arm in real:
                yield from _rows(f"{name}, {arm}", arm, real, pretended)


def _simulated(scenario: Scenario, arm: str, profile: Profile) -> RunSummary:
    seed, targets = scenario.seeds[0], scenario.targets.targets()
    outcome = simulate(
        build_workload(scenario, seed, {}), arm_named(arm), profile, targets, scenario.window,
        seed=seed, async_scheduling=True,
    )  # fmt: skip
    return summarise(outcome.records, scenario.duration_s, targets)


def _rows(
    place: str, arm: str, real: Summaries, pretended: Summaries
) -> Iterator[tuple[str, str, str, str, str]]:
    within = "1.1x" if arm == "conserve-gentle" else "-"
    for what, over, figure, aim, paper in (
        ("P99 TTFT over alone", ALONE, "ttft_p99_s", within, "-"),
        ("P99 TBT over alone", ALONE, "tbt_p99_s", within, "-"),
        ("offline tokens over first come first served", BOUND, "offline_tps", "0.85x", "0.88x"),
        ("total tokens over alone", ALONE, "total_tps", "2.35x", "2.2x to 2.35x"),
    ):
        before, found = (_ratio(summaries, arm, over, figure) for summaries in (pretended, real))
        yield f"{place}: {what}", aim, paper, before, found
    before, found = (_share(summaries[arm]) for summaries in (pretended, real))
    yield f"{place}: chats within targets", "100 %", "-", before, found


def _ratio(summaries: Summaries, arm: str, over: str, figure: str) -> str:
    ours, theirs = (getattr(summaries.get(name), figure, None) for name in (arm, over))
    return f"{ours / theirs:.2f}x" if ours is not None and theirs else "-"


def _share(summary: RunSummary) -> str:
    return "-" if summary.slo_attainment is None else f"{summary.slo_attainment:.1%}"


def validation(folder: Folder) -> Iterator[str]:
    """The simulator with the measured profile beside the real arms."""
    results, profile = ResultFolder(folder.path / "load"), folder.profile
    if profile is None or not (results.path / "run.json").is_file():
        return
    runs = [RealRun(r.key.point, r.key.arm, r.key.seed, r.records) for r in results.runs()]
    if runs:
        scenario = results.description().parsed_scenario()
        yield "Real arms, and the simulator with the measured profile:"
        yield ""
        yield markdown(compare(scenario, runs, profile, {}, async_scheduling=True))
