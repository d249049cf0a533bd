"""Fleets: conservation across replicas, routing, slots of time, and jobs with deadlines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from conserve.metrics import throughput
from conserve.sim.arms import ARMS
from conserve.sim.fleet import Fleet, Router
from conserve.sim.harvest import WINDOW, HarvestCurve, HarvestPoint, measure
from conserve.sim.profiles import Profile
from conserve.sim.slots import Job, run_slots, separate_replicas
from tests.sim.sim_world import COST, MACHINE, TARGETS, audit, workload

PROFILE = Profile("test", "made up", MACHINE, COST)
LENGTHS = {
    "kind": "independent",
    "prompt": {"kind": "fixed", "tokens": 300},
    "output": {"kind": "fixed", "tokens": 20},
}
CURVE = HarvestCurve(
    [
        HarvestPoint(0.0, 4.0, 400.0, None, None, None),
        HarvestPoint(2.0, 2.0, 200.0, 0.1, 0.05, 1.0),
        HarvestPoint(4.0, 0.0, 0.0, 0.2, 0.05, 0.5),
    ],
    tokens_per_request=100.0,
)


@pytest.mark.parametrize("router", ["round-robin", "least-loaded"])
def test_every_request_of_a_fleet_runs_on_one_replica_to_its_end(router: Router) -> None:
    work = workload(5, rate_rps=9.0)
    work.offline[100:] = []
    fleet = Fleet(3, ARMS["conserve"], PROFILE, TARGETS, router=router)
    outcome = fleet.run(work, -2.0, 200.0)
    assert all(record.finished for record in outcome.records)
    assert len(outcome.records) == len(work.online) + 100
    assert len({record.request_id for record in outcome.records}) == len(outcome.records)
    assert sum(outcome.num_routed) == len(work.online)
    assert max(outcome.num_routed) <= 1.3 * min(outcome.num_routed)
    for counters in outcome.counters:
        counters.check()
        assert counters.num_steps > 0
    for engine in fleet._engines:
        audit(engine.places)


def test_more_replicas_harvest_more() -> None:
    def harvest(num_replicas: int) -> float:
        work = workload(5, rate_rps=4.0)
        outcome = Fleet(num_replicas, ARMS["conserve"], PROFILE, TARGETS).run(work, -2.0, 20.0)
        got = throughput([r for r in outcome.records if not r.online], 0.0, 20.0)
        return got.prompt_tps + got.output_tps

    assert harvest(2) > 1.5 * harvest(1)


def test_same_fleet_same_records() -> None:
    runs = [
        Fleet(2, ARMS["conserve"], PROFILE, TARGETS, seed=3).run(workload(5), -2.0, 10.0).records
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_slots_share_a_quiet_fleet_among_jobs_by_deadline() -> None:
    """No online load: 2 replicas do 8 requests a second."""
    jobs = [Job("late", 480, 300.0), Job("early", 240, 200.0)]
    curves = {job.name: CURVE for job in jobs}
    outcome = run_slots(np.zeros(10), 60.0, 2, jobs, curves)
    finish = {job.job.name: job.finish_s for job in outcome.jobs}
    assert finish == {"early": pytest.approx(30.0), "late": pytest.approx(90.0)}
    assert all(job.on_time for job in outcome.jobs)
    total = float((outcome.harvested_tps + outcome.spare_tps).sum()) * 60
    assert total == pytest.approx(8 * 600 * 100)
    assert float(outcome.harvested_tps.sum()) * 60 == pytest.approx(720 * 100)


def test_a_job_waits_for_its_submission_and_misses_what_cannot_be_met() -> None:
    jobs = [Job("a", 600, 700.0, submit_s=120.0), Job("b", 10_000, 300.0)]
    outcome = run_slots(np.zeros(10), 60.0, 1, jobs, {"a": CURVE, "b": CURVE})
    first = {job.job.name: job for job in outcome.jobs}
    assert first["b"].finish_s is None
    assert first["b"].num_done_at_deadline == pytest.approx(4 * 300)
    assert first["a"].num_done == 0
    assert not first["a"].on_time


def test_online_load_takes_from_the_harvest() -> None:
    def done(rate_rps: float) -> float:
        jobs = [Job("j", 1e9, 1e9)]
        outcome = run_slots(np.full(200, rate_rps), 60.0, 50, jobs, {"j": CURVE}, seed=1)
        return outcome.jobs[0].num_done / (200 * 60 * 50)

    assert done(0.0) == pytest.approx(4.0)
    # The curve is a straight line, so that the spread over replicas averages out.
    assert done(100.0) == pytest.approx(2.0, rel=0.01)
    assert done(150.0) == pytest.approx(1.0, rel=0.02)


def test_a_separate_cluster_is_sized_by_its_tightest_interval() -> None:
    rates = {"a": 2.0, "b": 2.0}
    assert separate_replicas([Job("a", 200, 100.0)], rates) == pytest.approx(1.0)
    both = [Job("a", 200, 100.0), Job("b", 200, 150.0, submit_s=50.0)]
    assert separate_replicas(both, rates) == pytest.approx(200 / 150)
    tight = [Job("a", 200, 100.0), Job("b", 200, 60.0, submit_s=50.0)]
    assert separate_replicas(tight, rates) == pytest.approx(10.0)


def test_a_measured_curve_falls_with_load() -> None:
    curve = measure(
        PROFILE, ARMS["conserve"], TARGETS, LENGTHS, LENGTHS, 12.0, {}, seed=1, num_rates=3
    )
    rates = [point.offline_tps for point in curve.points]
    assert rates == sorted(rates, reverse=True)
    assert curve.points[0].ttft_p99_s is None
    assert curve.points[-1].rate_rps == 12.0
    alone = curve.offline_rps(np.array([0.0]))[0] * WINDOW.duration_s
    assert alone == pytest.approx(rates[0] * WINDOW.duration_s / curve.tokens_per_request)


def test_a_fleet_needs_a_replica() -> None:
    with pytest.raises(ValueError, match="num_replicas must be at least 1"):
        Fleet(0, ARMS["conserve"], replace(PROFILE, name="x"), TARGETS)
