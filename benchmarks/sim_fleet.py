"""A fleet in slots of time: its error against every step of every replica, and its speed.

    python benchmarks/sim_fleet.py

writes benchmarks/results/sim-fleet.json. No trace is needed: rates follow a day's sine.
"""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path
from random import Random

import numpy as np

from conserve.core.snapshot import Targets
from conserve.metrics import throughput
from conserve.sim.arms import ARMS
from conserve.sim.fleet import Fleet
from conserve.sim.harvest import measure
from conserve.sim.profiles import load_profile
from conserve.sim.slots import Job, run_slots
from conserve.workload import RequestPlan, Workload

PROFILE = load_profile("h100/llama-3.1-8b")
TARGETS = Targets(ttft_s=0.5, tbt_s=0.075)
ONLINE = {
    "kind": "independent",
    "prompt": {"kind": "lognormal", "median_tokens": 700, "sigma": 0.8, "max_tokens": 8192},
    "output": {"kind": "lognormal", "median_tokens": 100, "sigma": 0.6, "max_tokens": 1024},
}
OFFLINE = {
    "kind": "independent",
    "prompt": {"kind": "lognormal", "median_tokens": 3000, "sigma": 0.6, "max_tokens": 16384},
    "output": {"kind": "lognormal", "median_tokens": 150, "sigma": 0.5, "max_tokens": 512},
}
OUT = Path(__file__).parent / "results" / "sim-fleet.json"
SLOT_S = 60.0
REPLICAS, MINUTES = 4, 15
"""Of the fleet that is simulated in full."""
MEAN_RPS = 4.0
"""Online requests a second and replica."""


def rate_rps(at_s: float, day_s: float, num_replicas: int) -> float:
    """From a quarter of the mean to seven quarters, once a day."""
    return num_replicas * MEAN_RPS * (1 - 0.75 * math.cos(2 * math.pi * at_s / day_s))


def draw(lengths: dict[str, dict[str, float]], rng: Random) -> tuple[int, int]:
    sizes = []
    for part in ("prompt", "output"):
        spec = lengths[part]
        tokens = rng.lognormvariate(math.log(spec["median_tokens"]), spec["sigma"])
        sizes.append(min(max(1, round(tokens)), int(spec["max_tokens"])))
    return sizes[0], sizes[1]


def full_fleet(seed: int) -> tuple[float, float]:
    """(offline tokens, seconds of processor time) of every step of REPLICAS replicas."""
    rng, day_s = Random(seed), MINUTES * 60.0
    most = rate_rps(day_s / 2, day_s, REPLICAS)
    online, now_s = [], 0.0
    # Lewis and Shedler's thinning: arrivals at the highest rate, kept with probability r / most.
    while (now_s := now_s + rng.expovariate(most)) < day_s:
        if rng.random() * most < rate_rps(now_s, day_s, REPLICAS):
            online.append(RequestPlan(f"online-{len(online)}", True, now_s, *draw(ONLINE, rng)))
    offline = [RequestPlan(f"offline-{i}", False, 0.0, *draw(OFFLINE, rng)) for i in range(60_000)]
    fleet = Fleet(REPLICAS, ARMS["conserve"], PROFILE, TARGETS, seed=seed)
    start = time.process_time()
    outcome = fleet.run(Workload(online, offline, in_flight=512), -60.0, day_s)
    spent = time.process_time() - start
    got = throughput([r for r in outcome.records if not r.online], 0.0, day_s)
    return (got.prompt_tps + got.output_tps) * day_s, spent


def main() -> None:
    start = time.process_time()
    most_rps = 2.5 * MEAN_RPS
    curve = measure(PROFILE, ARMS["conserve"], TARGETS, ONLINE, OFFLINE, most_rps, {})
    curve_s = time.process_time() - start
    errors, full_s = [], []
    for seed in (1, 2):
        tokens, spent = full_fleet(seed)
        day_s = MINUTES * 60.0
        rates = np.array([rate_rps(t + SLOT_S / 2, day_s, REPLICAS)
                          for t in np.arange(0.0, day_s, SLOT_S)])  # fmt: skip
        slots = run_slots(rates, SLOT_S, REPLICAS, [], {"job": curve}, seed=seed)
        errors.append(float(slots.spare_tps.sum() * SLOT_S) / tokens - 1)
        full_s.append(spent)
        print(
            f"seed {seed}: {tokens:,.0f} offline tokens in full, slots {errors[-1]:+.1%}",
            flush=True,
        )
    start = time.process_time()
    day_s = 86_400.0
    rates = np.array([rate_rps(t, day_s, 1000) for t in np.arange(0.0, day_s, SLOT_S)])
    jobs = [Job(f"job-{i}", 2e6, (i + 1) * day_s / 10) for i in range(10)]
    day = run_slots(rates, SLOT_S, 1000, jobs, {job.name: curve for job in jobs})
    result = {
        "curve_s": round(curve_s, 1),
        "full_replica_hours": REPLICAS * MINUTES / 60,
        "full_s": [round(value, 1) for value in full_s],
        "error": [round(value, 4) for value in errors],
        "day_of_1000_replicas_s": round(time.process_time() - start, 2),
        "jobs_on_time": sum(job.on_time for job in day.jobs),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
