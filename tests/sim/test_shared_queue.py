"""One queue for many replicas: the database's time, and replicas that fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from conserve.sim.harvest import HarvestCurve, HarvestPoint
from conserve.sim.shared_queue import Failures, SharedQueue
from conserve.sim.slots import run_slots

# Ten lines a second, whatever the online load.
CURVE = HarvestCurve([HarvestPoint(rate, 10.0, 10.0, None, None, None) for rate in (0.0, 9.0)])
QUEUE = SharedQueue(
    line_ms=0.5,
    replica_ms_per_s=2.0,
    connections_a_replica=5.0,
    takeover_s=30.0,
    lines_held=64.0,
    num_cores=1,
)


def harvest_rps(num_replicas: int, queue: SharedQueue, failures: Failures | None = None) -> float:
    day = run_slots(
        np.zeros(400), 60.0, num_replicas, [], {"j": CURVE}, queue=queue, failures=failures
    )
    return float(day.spare_tps.mean())


def test_few_replicas_are_bound_by_their_engines_and_many_by_the_database() -> None:
    assert harvest_rps(10, QUEUE) == pytest.approx(100)
    # 1,000 ms a second, less 2 for each replica's looks, at half a millisecond a line.
    assert harvest_rps(250, QUEUE) == pytest.approx((1000 - 500) / 0.5)
    assert harvest_rps(250, replace(QUEUE, num_cores=4)) == pytest.approx(2500)


def test_the_most_replicas_are_those_that_use_the_database_up() -> None:
    most = QUEUE.most_replicas(10.0)
    assert most == 142
    assert most * 10.0 <= QUEUE.most_rps(most)
    assert (most + 1) * 10.0 > QUEUE.most_rps(most + 1)


def test_looks_alone_may_use_a_database_up() -> None:
    assert harvest_rps(500, QUEUE) == 0
    assert QUEUE.most_rps(600) == 0


def test_failures_cost_the_time_away_and_what_runs_again() -> None:
    failures = Failures(mtbf_s=3600.0, away_s=400.0)
    up = 100 * 3600 / 4000
    expected = up * 10 - up / 3600 * 64
    found = harvest_rps(100, replace(QUEUE, num_cores=8), failures)
    assert found == pytest.approx(expected, rel=0.01)
    assert found < harvest_rps(100, replace(QUEUE, num_cores=8))
