"""What the planner's page shows: one replica, simulated at every place where its sliders stop.

    nice python benchmarks/planner_grid.py

writes src/conserve/sim/planner/grid.json. The axes are below; a longer one makes a finer slider,
and the page needs no change. A finished run is kept in out/planner-grid, so that an interrupted
grid goes on; of other code or other lengths it is made anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from conserve.core.settings import CHAT_SLOWDOWN
from conserve.metrics import RunSummary
from conserve.sim.arms import ARMS, BOUND, ONLINE_ONLY, Arm
from conserve.sim.harvest import Load, at_rate
from conserve.sim.own_targets import own_targets
from conserve.sim.profiles import load_profile
from conserve.workload import Window

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "src" / "conserve" / "sim" / "planner" / "grid.json"
KEPT = ROOT / "out" / "planner-grid"

MACHINES = (
    ("h100", 1, "llama-3.1-8b"),
    ("h100", 1, "qwen-2.5-14b"),
    ("h100", 4, "llama-3.1-70b"),
    ("a100-80", 1, "llama-3.1-8b"),
    ("l40s", 1, "llama-3.1-8b"),
)
LOADS = (0.05, 0.2, 0.4, 0.6)
"""Chats a second, as a share of what one replica answers of them at most."""
BURSTS = (1.0, 3.0)
"""Coefficient of variation of the time between two chats: 1 is chance alone."""
SLOWDOWNS = (CHAT_SLOWDOWN["gentle"], 1.25, CHAT_SLOWDOWN["balanced"], 2.0, 3.0, 0.0)
"""--chat-slowdown; 0 is greedy."""
CHATS = (700, 1.0, 8192, 150, 0.7, 1024)
"""Median, sigma and most tokens of prompts, then of answers."""
WORK = {
    "summaries": (3000, 0.7, 16384, 150, 0.5, 512),
    "stories": (200, 0.5, 1024, 600, 0.5, 2048),
}
WINDOW = Window(lead_in_s=20.0, duration_s=90.0, drain_s=30.0)
SEED = 1
FIGURES = ("ttft_p50_s", "ttft_p99_s", "tbt_p50_s", "tbt_p99_s", "tbt_mean_s", "slo_attainment")
HARVEST = ("offline_rps", "offline_tps")


@dataclass(frozen=True, slots=True)
class Case:
    """One run. rate_rps: chats a second, 0 for none. work: None for chats alone."""

    machine: tuple[str, int, str]
    rate_rps: float
    cv: float
    work: str | None
    arm: str
    slowdown: float | None = None

    @property
    def profile(self) -> str:
        gpu, count, model = self.machine
        return f"{gpu}x{count}/{model}" if count > 1 else f"{gpu}/{model}"

    def file(self) -> Path:
        """Where its figures are kept: what would change them changes its name."""
        words = json.dumps(
            [asdict(self), CHATS, WORK, asdict(WINDOW), SEED, code()], sort_keys=True
        )
        return KEPT / f"{sha256(words.encode()).hexdigest()[:16]}.json"


@cache
def code() -> str:
    """A digest of what decides the figures: policy, simulator, its profiles, and loads."""
    digest = sha256()
    for room in ("core", "metrics", "sim", "workload"):
        for path in sorted((ROOT / "src" / "conserve" / room).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def lengths(spec: tuple[float, ...]) -> dict[str, Any]:
    names = ("median_tokens", "sigma", "max_tokens")
    parts = zip(("prompt", "output"), (spec[:3], spec[3:]), strict=True)
    drawn = {p: {"kind": "lognormal", **dict(zip(names, s, strict=True))} for p, s in parts}
    return {"kind": "independent", **drawn}


def load_of(case: Case) -> Load:
    """Chats alone have offline work that their arm never runs."""
    work = case.work or next(iter(WORK))
    offline = CHATS if work == "chats" else WORK[work]
    return Load(lengths(CHATS), lengths(offline), case.rate_rps, case.cv)


def arm_of(case: Case) -> Arm:
    arm = ARMS[case.arm]
    if case.slowdown is None:
        return arm
    return replace(arm, settings=replace(arm.settings, chat_slowdown=case.slowdown))


def run(case: Case) -> dict[str, float | None]:
    """Its figures; simulated unless they are kept."""
    if case.file().is_file():
        kept: dict[str, float | None] = json.loads(case.file().read_text())
        return kept
    profile = load_profile(case.profile)
    targets = own_targets(profile).targets
    summary, _ = at_rate(
        profile, arm_of(case), targets, load_of(case), {}, seed=SEED, window=WINDOW
    )
    figures = shown(summary)
    KEPT.mkdir(parents=True, exist_ok=True)
    case.file().write_text(json.dumps(figures))
    return figures


def shown(summary: RunSummary) -> dict[str, float | None]:
    return {name: getattr(summary, name) for name in (*FIGURES, *HARVEST)}


def rounded(figures: Mapping[str, float | None], names: tuple[str, ...]) -> list[float | None]:
    values = [figures[name] for name in names]
    return [None if value is None else float(f"{value:.4g}") for value in values]


def most_rps(machine: tuple[str, int, str]) -> float:
    """Chats a second of a replica that always has more of them than it can run."""
    return run(Case(machine, 0.0, 1.0, "chats", BOUND))["offline_rps"] or 0.0


def cases(machines: Any) -> Iterator[Case]:
    """Every run but those of `most_rps`, on which the rates depend."""
    for machine in machines:
        rates = [share * most_rps(machine) for share in LOADS]
        for work in WORK:
            yield Case(machine, 0.0, 1.0, work, BOUND)
        for rate_rps, cv in product(rates, BURSTS):
            yield Case(machine, rate_rps, cv, None, ONLINE_ONLY)
            for work in WORK:
                yield Case(machine, rate_rps, cv, work, BOUND)
                for slowdown in SLOWDOWNS:
                    yield Case(machine, rate_rps, cv, work, "conserve", slowdown)


def grid(machines: Any) -> dict[str, Any]:
    return {
        "made_by": "python benchmarks/planner_grid.py",
        "seconds": WINDOW.duration_s,
        "loads": LOADS,
        "bursts": BURSTS,
        "slowdowns": SLOWDOWNS,
        "chats": {"prompt_tokens": CHATS[0], "answer_tokens": CHATS[3]},
        "work": {name: {"prompt_tokens": w[0], "answer_tokens": w[3]} for name, w in WORK.items()},
        "chat_figures": FIGURES,
        "harvest_figures": HARVEST,
        "machines": [of_machine(machine) for machine in machines],
    }


def of_machine(machine: tuple[str, int, str]) -> dict[str, Any]:
    """`alone` and the rest are lists over loads, then bursts; `beside` also over slowdowns, with
    chat's figures and then the harvest's."""
    gpu, count, model = machine
    rates = [share * most_rps(machine) for share in LOADS]
    places = list(product(rates, BURSTS))
    targets = own_targets(load_profile(Case(machine, 0, 1, None, BOUND).profile)).targets
    return {
        "gpu": gpu,
        "num_gpus": count,
        "model": model,
        "most_rps": float(f"{most_rps(machine):.4g}"),
        "ttft_target_s": targets.ttft_s,
        "tbt_target_s": targets.tbt_s,
        "alone": [
            rounded(run(Case(machine, rate, cv, None, ONLINE_ONLY)), FIGURES) for rate, cv in places
        ],
        "work": {work: of_work(machine, work, places) for work in WORK},
    }


def of_work(
    machine: tuple[str, int, str], work: str, places: list[tuple[float, float]]
) -> dict[str, Any]:
    dedicated = run(Case(machine, 0.0, 1.0, work, BOUND))
    return {
        "dedicated": rounded(dedicated, HARVEST),
        "first_come": [
            rounded(run(Case(machine, rate, cv, work, BOUND)), (*FIGURES, *HARVEST))
            for rate, cv in places
        ],
        "beside": [
            [
                rounded(run(Case(machine, rate, cv, work, "conserve", s)), (*FIGURES, *HARVEST))
                for s in SLOWDOWNS
            ]
            for rate, cv in places
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--machines", type=int, default=len(MACHINES), help="only the first so many"
    )
    asked = parser.parse_args()
    machines = MACHINES[: asked.machines]
    with multiprocessing.Pool(asked.processes) as pool:
        pool.map(most_rps, machines)
        wanted = list(cases(machines))
        for done, _ in enumerate(pool.imap_unordered(run, wanted), 1):
            if done % 20 == 0:
                print(f"{done} of {len(wanted)}", flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(grid(machines), separators=(",", ":")) + "\n")
    print(f"{OUT.relative_to(ROOT)}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
