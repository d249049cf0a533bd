"""A fleet in slots of time: its error against every step of every replica, and its speed.

    python benchmarks/sim_fleet.py

writes benchmarks/results/sim-fleet.json. No trace is needed: rates follow a day's sine. What the
queue costs a thousand replicas is reckoned with what benchmarks/fleet_scale.py has measured
(benchmarks/results/fleet-scale.json), and both go into the tables of docs/fleet.md; `--queue-only`
makes that part again and leaves the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import time
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fleet.page import write_page
from numpy.typing import NDArray

from conserve.core.snapshot import Targets
from conserve.metrics import throughput
from conserve.sim.arms import ARMS
from conserve.sim.fleet import Fleet
from conserve.sim.harvest import HarvestCurve, measure
from conserve.sim.profiles import load_profile
from conserve.sim.shared_queue import Failures, SharedQueue
from conserve.sim.slots import Job, run_slots
from conserve.workload import RequestPlan, Workload

Lengths = dict[str, Any]
"""As a scenario has them."""

PROFILE = load_profile("h100/llama-3.1-8b")
TARGETS = Targets(ttft_s=0.5, tbt_s=0.075)
ONLINE: Lengths = {
    "kind": "independent",
    "prompt": {"kind": "lognormal", "median_tokens": 700, "sigma": 0.8, "max_tokens": 8192},
    "output": {"kind": "lognormal", "median_tokens": 100, "sigma": 0.6, "max_tokens": 1024},
}
OFFLINE: Lengths = {
    "kind": "independent",
    "prompt": {"kind": "lognormal", "median_tokens": 3000, "sigma": 0.6, "max_tokens": 16384},
    "output": {"kind": "lognormal", "median_tokens": 150, "sigma": 0.5, "max_tokens": 512},
}
SHORT: Lengths = {
    "kind": "independent",
    "prompt": {"kind": "lognormal", "median_tokens": 150, "sigma": 0.6, "max_tokens": 2048},
    "output": {"kind": "lognormal", "median_tokens": 10, "sigma": 0.5, "max_tokens": 64},
}
"""Lines of classification: few tokens each, so that the queue has much to do."""
RESULTS = Path(__file__).parent / "results"
OUT, MEASURED = RESULTS / "sim-fleet.json", RESULTS / "fleet-scale.json"
LEASE_S = 30.0
REPLICAS_OF_A_DAY = 1000
FAILURES = Failures(mtbf_s=86_400.0, away_s=600.0)
"""Each replica once a day, ten minutes away."""
SLOT_S = 60.0
REPLICAS, MINUTES = 4, 15
"""Of the fleet that is simulated in full."""
MEAN_RPS = 4.0
"""Online requests a second and replica."""


def rate_rps(at_s: float, day_s: float, num_replicas: int) -> float:
    """From a quarter of the mean to seven quarters, once a day."""
    return num_replicas * MEAN_RPS * (1 - 0.75 * math.cos(2 * math.pi * at_s / day_s))


def rates_of_slots(day_s: float, num_replicas: int, *, at: float = 0.0) -> NDArray[np.float64]:
    """The rate in each slot of the day, `at` that share of the slot."""
    starts_s = np.arange(0.0, day_s, SLOT_S).tolist()
    return np.array([rate_rps(start_s + at * SLOT_S, day_s, num_replicas) for start_s in starts_s])


def draw(lengths: Lengths, rng: Random) -> tuple[int, int]:
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
    online: list[RequestPlan] = []
    now_s = 0.0
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


def measured_queue(num_cores: int) -> SharedQueue:
    """As it was measured with the most replicas; a takeover's time is in leases."""
    found = json.loads(MEASURED.read_text())
    busy = [row for row in found["hand_out"] if row["database"] == "postgres" and row["keys"] == 1]
    (apart,) = (row for row in found["takeover"] if row["where"] == "machines of their own")
    return SharedQueue(
        line_ms=busy[-1]["postgres_cpu_ms_a_line"],
        replica_ms_per_s=found["idle"][-1]["postgres_cpu_ms_per_s_a_replica"],
        connections_a_replica=found["idle"][-1]["connections"] / found["idle"][-1]["replicas"],
        takeover_s=statistics.median(apart["running_again_s"]) / apart["lease_s"] * LEASE_S,
        lines_held=64.0,
        num_cores=num_cores,
    )


def day_of_1000(curve: HarvestCurve, queue: SharedQueue | None, *, failing: bool) -> float:
    """Lines a second, over a day."""
    day_s, failures = 86_400.0, FAILURES if failing else None
    rates = rates_of_slots(day_s, REPLICAS_OF_A_DAY)
    day = run_slots(
        rates, SLOT_S, REPLICAS_OF_A_DAY, [], {"job": curve}, queue=queue, failures=failures
    )
    return float(day.spare_tps.mean() / curve.tokens_per_request)


def queues(curves: dict[str, HarvestCurve]) -> list[dict[str, Any]]:
    """A thousand replicas on one database of so many cores: what is harvested of what the engines
    would, without and with failures."""
    rows = []
    for (name, curve), cores in product(curves.items(), (1, 4, 16)):
        queue = measured_queue(cores)
        engines = day_of_1000(curve, None, failing=False)
        alone = day_of_1000(curve, queue, failing=False)
        rows.append(
            {
                "lines": name,
                "tokens_a_line": round(curve.tokens_per_request),
                "database_cores": cores,
                "engines_lines_per_s": round(engines, 1),
                "lines_per_s": round(alone, 1),
                "of_the_engines": round(alone / engines, 3),
                "with_failures": round(day_of_1000(curve, queue, failing=True) / engines, 3),
                "most_lines_per_s": round(queue.most_rps(REPLICAS_OF_A_DAY)),
                "most_replicas": queue.most_replicas(engines / REPLICAS_OF_A_DAY),
                "connections": round(queue.connections_a_replica * REPLICAS_OF_A_DAY),
                "takeovers_an_hour": round(3600 * REPLICAS_OF_A_DAY / FAILURES.mtbf_s),
                "takeover_s": round(queue.takeover_s, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--queue-only", action="store_true", help="leave the rest as it is")
    queue_only = parser.parse_args().queue_only
    result = json.loads(OUT.read_text()) if queue_only else slots_beside_full()
    most_rps = 2.5 * MEAN_RPS
    curves = {
        name: measure(PROFILE, ARMS["conserve"], TARGETS, ONLINE, lengths, most_rps, {})
        for name, lengths in (("documents", OFFLINE), ("classification", SHORT))
    }
    result["queues"] = queues(curves)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    write_page()
    print(json.dumps(result, indent=1))


def slots_beside_full() -> dict[str, Any]:
    start = time.process_time()
    most_rps = 2.5 * MEAN_RPS
    curve = measure(PROFILE, ARMS["conserve"], TARGETS, ONLINE, OFFLINE, most_rps, {})
    curve_s = time.process_time() - start
    errors, full_s = [], []
    for seed in (1, 2):
        tokens, spent = full_fleet(seed)
        day_s = MINUTES * 60.0
        rates = rates_of_slots(day_s, REPLICAS, at=0.5)
        slots = run_slots(rates, SLOT_S, REPLICAS, [], {"job": curve}, seed=seed)
        errors.append(float(slots.spare_tps.sum() * SLOT_S) / tokens - 1)
        full_s.append(spent)
        print(
            f"seed {seed}: {tokens:,.0f} offline tokens in full, slots {errors[-1]:+.1%}",
            flush=True,
        )
    start = time.process_time()
    day_s = 86_400.0
    rates = rates_of_slots(day_s, 1000)
    jobs = [Job(f"job-{i}", 2e6, (i + 1) * day_s / 10) for i in range(10)]
    day = run_slots(rates, SLOT_S, 1000, jobs, {job.name: curve for job in jobs})
    return {
        "curve_s": round(curve_s, 1),
        "full_replica_hours": REPLICAS * MINUTES / 60,
        "full_s": [round(value, 1) for value in full_s],
        "error": [round(value, 4) for value in errors],
        "day_of_1000_replicas_s": round(time.process_time() - start, 2),
        "jobs_on_time": sum(job.on_time for job in day.jobs),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


if __name__ == "__main__":
    main()
