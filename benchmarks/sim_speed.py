"""How many policy steps a minute the simulator makes on one core, at 256 running requests.

    python benchmarks/sim_speed.py [--profile]

prints steps a minute of processor time, and where that time goes.
"""

from __future__ import annotations

import cProfile
import pstats
import time
from random import Random
from typing import Annotated

import typer

from conserve.core.snapshot import Targets
from conserve.sim.arms import ARMS
from conserve.sim.profiles import load_profile
from conserve.sim.run import Window, simulate
from conserve.workload import RequestPlan, Workload

TARGETS = Targets(ttft_s=1.0, tbt_s=0.1)
WINDOW = Window(lead_in_s=20.0, duration_s=200.0, drain_s=0.0)


def workload() -> Workload:
    """Chats at 4 a second beside offline requests that fill every slot with decodes."""
    rng = Random(1)
    online, now_s = [], 0.0
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
    profiler = cProfile.Profile()
    running: list[int] = []
    start_s = time.process_time()
    if profile:
        profiler.enable()
    outcome = simulate(
        work,
        ARMS["conserve"],
        machine,
        TARGETS,
        WINDOW,
        on_step=lambda step: running.append(len(step.grants)),
    )
    profiler.disable()
    seconds = time.process_time() - start_s
    steps = outcome.counters.num_steps
    print(
        f"{steps} steps, {sum(running) / len(running):.0f} requests in a step on average: "
        f"{steps / seconds * 60:,.0f} steps a minute of processor time"
    )
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    typer.run(main)
