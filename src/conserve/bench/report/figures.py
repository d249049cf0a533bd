"""The numbers of a benchmark: every figure of every arm, with its spread over seeds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from conserve.bench.arms import FORGETFUL, known_arm
from conserve.bench.batch_load import offline_figures
from conserve.bench.report.first_tokens import part_figures
from conserve.bench.report.kv_copies import figures_of_copies
from conserve.bench.report.stops import stop_figures
from conserve.bench.store import ResultFolder, Run
from conserve.core.snapshot import Targets
from conserve.metrics import median, summarise
from conserve.sim.arms import BOUND, ONLINE_ONLY

PREFIX_HITS = "prefix_cache_hit_ratio"
HITS = "online_hit_ratio"
"""RunSummary's, of the prompts of conversations."""

ALONE = (ONLINE_ONLY, "conserve-online-only")
"""Arms without offline work; the first that was run is what latencies are compared with."""
RECOMPUTING = ("conserve-recompute", "conserve-offline-only-recompute")
"""Arms without KV checkpoints; the first that was run is what checkpoints are compared with."""


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over the seeds of an arm: the middle one and the two ends."""

    median: float
    low: float
    high: float
    num_seeds: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None when no run has the figure. Rounded to 6 digits, which is what files hold."""
        there = sorted(value for value in values if value is not None)
        middle = median(there)
        if middle is None:
            return None
        return cls(_rounded(middle), _rounded(there[0]), _rounded(there[-1]), len(there))


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure over the same figure, same seed, of another arm."""

    name: str
    label: str
    metric: str
    over: str


RATIOS = (
    # What a typical user feels comes first: a P99 within its target says nothing of it.
    Ratio("ttft_p50_over_alone", "TTFT P50 over {alone}", "ttft_p50_s", "alone"),
    Ratio("tbt_p50_over_alone", "TBT P50 over {alone}", "tbt_p50_s", "alone"),
    Ratio("tbt_mean_over_alone", "mean TBT over {alone}", "tbt_mean_s", "alone"),
    Ratio("ttft_p99_over_alone", "TTFT P99 over {alone}", "ttft_p99_s", "alone"),
    Ratio("tbt_p99_over_alone", "TBT P99 over {alone}", "tbt_p99_s", "alone"),
    Ratio("offline_rps_over_bound", "offline requests over {bound}", "offline_rps", "bound"),
    Ratio("offline_tps_over_bound", "offline tokens over {bound}", "offline_tps", "bound"),
    Ratio(
        "offline_tps_over_recompute",
        "offline tokens over recomputing",
        "offline_tps",
        "recompute",
    ),
    Ratio("total_tps_over_alone", "total tokens over {alone}", "total_tps", "alone"),
)

HISTORY_RATIOS = (
    Ratio("hits_over_alone", "chats' tokens found over {alone}", HITS, "alone"),
    Ratio(
        "offline_tps_over_forgetful",
        "offline tokens over {forgetful}",
        "offline_tps",
        "forgetful",
    ),
)
"""Of runs whose servers told what they found in the prefix cache."""

ArmFigures = dict[str, Spread]
"""Figures of one arm at one point: names of RunSummary, RATIOS and HISTORY_RATIOS, PREFIX_HITS,
`counted:NAME`, and those of stops (stops.py) and of first tokens (first_tokens.py)."""

RISING = ("_total", "_sum", "_count", "_bucket")
"""How the names of samples end that only ever rise."""


@dataclass(frozen=True, slots=True)
class Figures:
    """points[point][arm][name]. alone, bound: the arms that ratios are over, None if not run."""

    points: dict[str, dict[str, ArmFigures]]
    alone: str | None
    bound: str | None

    def label(self, ratio: Ratio) -> str:
        return ratio.label.format(alone=self.alone, bound=self.bound, forgetful=FORGETFUL)

    def has_ratio(self, ratio: Ratio) -> bool:
        return any(ratio.name in arm for arms in self.points.values() for arm in arms.values())

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_figures(path: Path) -> Figures:
    table = json.loads(path.read_text())
    points = {
        point: {
            arm: {name: Spread(**value) for name, value in named.items()}
            for arm, named in arms.items()
        }
        for point, arms in table["points"].items()
    }
    return Figures(points, table["alone"], table["bound"])


def figures_of(folder: ResultFolder) -> Figures:
    """All figures of a folder's finished runs."""
    scenario = folder.description().parsed_scenario()
    targets = scenario.targets.targets()
    runs: dict[str, dict[str, dict[int, dict[str, float | None]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for run in folder.runs():
        values = {
            **values_of(run, scenario.duration_s, targets),
            **figures_of_copies(run),
            **_counted(run),
            **stop_figures(run),
            **part_figures(run),
        }
        runs[run.key.point][run.key.arm][run.key.seed] = values
    measured = {arm for arms in runs.values() for arm in arms}
    alone = next((arm for arm in ALONE if arm in measured), None)
    bound = BOUND if BOUND in measured else None
    recompute = next((arm for arm in RECOMPUTING if arm in measured), None)
    forgetful = FORGETFUL if FORGETFUL in measured else None
    over = {"alone": alone, "bound": bound, "recompute": recompute, "forgetful": forgetful}
    points = {}
    for point, arms in runs.items():
        _add_ratios(arms, over)
        points[point] = {arm: _spreads(by_seed) for arm, by_seed in arms.items()}
    return Figures(points, alone, bound)


def values_of(run: Run, duration_s: float, targets: Targets) -> dict[str, float | None]:
    """RunSummary's figures of one run, by name; what went as a batch is counted by the server."""
    values = asdict(summarise(run.records, duration_s, targets))
    values[PREFIX_HITS] = _prefix_hits(run)
    return {**values, **(offline_figures(run, duration_s) if known_arm(run.key.arm).batch else {})}


def _prefix_hits(run: Run) -> float | None:
    """Share of the prompt tokens looked up in vLLM's prefix cache that were there."""
    queries = run.counted("vllm:prefix_cache_queries_total")
    hits = run.counted("vllm:prefix_cache_hits_total")
    return hits / queries if queries and hits is not None else None


def _counted(run: Run) -> dict[str, float | None]:
    """How far each of the server's counters rose, and what its gauges stood at in the end."""
    counted: dict[str, float | None] = {}
    for name, value in run.counters_end.items():
        rises = name.partition("{")[0].endswith(RISING)
        counted[f"counted:{name}"] = run.counted(name) if rises else value
    return counted


def _add_ratios(
    arms: dict[str, dict[int, dict[str, float | None]]], over: dict[str, str | None]
) -> None:
    for arm, by_seed in arms.items():
        for seed, values in by_seed.items():
            told = values.get(HITS) is not None
            for ratio in (*RATIOS, *HISTORY_RATIOS) if told else RATIOS:
                base = over[ratio.over]
                if base is None or base == arm or not _comparable(arm, ratio):
                    continue
                below = arms.get(base, {}).get(seed, {}).get(ratio.metric)
                above = values[ratio.metric]
                if below and above is not None:
                    values[ratio.name] = above / below


def _comparable(arm: str, ratio: Ratio) -> bool:
    """An arm without offline requests has no share of another's offline work."""
    return ratio.over == "alone" or known_arm(arm).offline


def _spreads(by_seed: dict[int, dict[str, float | None]]) -> ArmFigures:
    names = dict.fromkeys(name for values in by_seed.values() for name in values)
    spreads = {name: Spread.of(values.get(name) for values in by_seed.values()) for name in names}
    return {name: spread for name, spread in spreads.items() if spread is not None}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
