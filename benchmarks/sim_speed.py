"""How many policy steps a minute the simulator makes on one core, at 256 running requests.

    python benchmarks/sim_speed.py [--profile]

writes benchmarks/results/sim-speed.json: steps a minute of processor time, the median of three
runs. With --profile it shows where that time goes instead.
"""

from __future__ import annotations

import cProfile
import json
import platform
import pstats
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated

import typer

from conserve.core.snapshot import Targets
from conserve.sim.arms import ARMS
from conserve.sim.profiles import Profile, load_profile
from conserve.sim.run import simulate
from conserve.workload import RequestPlan, Window, Workload

TARGETS = Targets(ttft_s=1.0, tbt_s=0.1)
OUT = Path(__file__).parent / "results" / "sim-speed.json"
REPEATS = 3
WINDOW = Window(lead_in_s=20.0, duration_s=200.0, drain_s=0.0)


def workload() -> Workload:
    """Chats at 4 a second beside offline requests that fill every slot with decodes."""
    rng = Random(1)
    online: list[RequestPlan] = []
    now_s = 0.0
    while (now_s := now_s + rng.expovariate(4.0)) < WINDOW.duration_s:
        lengths = rng.randint(100, 1500), rng.randint(10, 300)
        online.append(RequestPlan(f"online-{len(online)}", True, now_s, *lengths))
    offline = [
        RequestPlan(f"offline-{i}", False, 0.0, rng.randint(100, 1000), rng.randint(100, 900))
        for i in range(20_000)
    ]
    return Workload(online, offline, in_flight=400)


def main(
    profile: Annotated[bool, typer.Option(help="Run under cProfile and show the top.")] = False,
) -> None:
    work, machine = workload(), load_profile("h100/llama-3.1-8b")
    simulate(work, ARMS["conserve"], machine, TARGETS, Window(1.0, 5.0, 0.0))
    if profile:
        with cProfile.Profile() as profiler:
            measure(work, machine)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(14)
        return
    runs = [measure(work, machine) for _ in range(REPEATS)]
    result = {
        "num_steps": runs[0][0],
        "requests_a_step": round(runs[0][1]),
        "slots": machine.machine.max_running,
        "steps_a_minute": round(median(steps / seconds * 60 for steps, _, seconds in runs)),
        "least": round(min(steps / seconds * 60 for steps, _, seconds in runs)),
        "most": round(max(steps / seconds * 60 for steps, _, seconds in runs)),
        "python": platform.python_version(),
    }
    text = json.dumps(result, indent=1)
    OUT.write_text(text + "\n")
    print(text)


def measure(work: Workload, machine: Profile) -> tuple[int, float, float]:
    """Steps, requests in a step on average, and seconds of processor time."""
    running: list[int] = []
    start_s = time.process_time()
    outcome = simulate(
        work,
        ARMS["conserve"],
        machine,
        TARGETS,
        WINDOW,
        on_step=lambda step: running.append(len(step.grants)),
    )
    seconds = time.process_time() - start_s
    return outcome.counters.num_steps, sum(running) / len(running), seconds


if __name__ == "__main__":
    typer.run(main)
