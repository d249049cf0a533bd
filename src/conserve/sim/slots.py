"""A fleet over hours or days: slots of time, each replica harvesting as its online load allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from conserve.sim.harvest import Floats, HarvestCurve
from conserve.sim.shared_queue import Failures, SharedQueue


@dataclass(frozen=True, slots=True)
class Job:
    """A batch: `num_requests` offline requests, from `submit_s` on, wanted by `deadline_s`."""

    name: str
    num_requests: float
    deadline_s: float
    submit_s: float = 0.0


@dataclass(slots=True)
class JobOutcome:
    """Seconds from the start; None: not done when the time was over."""

    job: Job
    finish_s: float | None = None
    num_done_at_deadline: float = 0.0
    num_done: float = 0.0

    @property
    def on_time(self) -> bool:
        return self.finish_s is not None and self.finish_s <= self.job.deadline_s


@dataclass(slots=True)
class SlotsOutcome:
    """Arrays have one entry a slot, over all replicas together."""

    slot_s: float
    rates_rps: Floats
    harvested_tps: Floats
    """Offline tokens a second (prompt and output) that were done."""
    spare_tps: Floats
    """What could have been done besides, of requests like the first job's."""
    slo_attainment: float
    """Of all online requests."""
    jobs: list[JobOutcome] = field(default_factory=list)


def run_slots(
    rates_rps: Floats,
    slot_s: float,
    num_replicas: int,
    jobs: Sequence[Job],
    curves: Mapping[str, HarvestCurve],
    *,
    seed: int = 0,
    queue: SharedQueue | None = None,
    failures: Failures | None = None,
) -> SlotsOutcome:
    """Spread `rates_rps` (one entry a slot, of the whole service) over replicas and work off jobs.

    Each replica's arrivals in a slot are drawn from a Poisson distribution (a router that does
    not look at load). All replicas work on the job with the earliest deadline among those
    submitted; what a job leaves of a slot goes to the next. `curves` has one curve for each
    job's name; without jobs, one under any name says what is spare.

    The replicas take their work from `queue` (without one it costs nothing), and those that fail
    leave their online load to the others.
    """
    outcomes = [JobOutcome(job) for job in sorted(jobs, key=lambda j: (j.deadline_s, j.name))]
    any_curve = next(iter(curves.values()))
    harvested, spare = np.zeros_like(rates_rps), np.zeros_like(rates_rps)
    met = total = 0.0
    most_rps = math.inf if queue is None else queue.most_rps(num_replicas)
    redone_rps = failures.redone_rps(num_replicas, queue) if failures and queue else 0.0
    for slot, counts in enumerate(_arrivals(rates_rps * slot_s, num_replicas, failures, seed)):
        loads_rps = counts / slot_s
        met += float(counts @ any_curve.slo_attainment(loads_rps))
        total += float(counts.sum())
        useful_rps = partial(_useful_rps, loads_rps, most_rps, redone_rps)
        left, tokens = _work(outcomes, curves, useful_rps, slot * slot_s, slot_s)
        harvested[slot] = tokens / slot_s
        spare[slot] = left * useful_rps(any_curve) * any_curve.tokens_per_request
    attainment = met / total if total else 1.0
    return SlotsOutcome(slot_s, rates_rps, harvested, spare, attainment, outcomes)


def _arrivals(
    expected: Floats, num_replicas: int, failures: Failures | None, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Of each slot in which so many requests are expected, how many each replica gets that is up:
    one at least."""
    rng = np.random.default_rng(seed)
    for num_requests in expected:
        num_up = num_replicas
        if failures is not None:
            num_up = max(1, rng.binomial(num_replicas, failures.share_up))
        yield rng.poisson(num_requests / num_up, num_up)


def _useful_rps(
    loads_rps: Floats, most_rps: float, redone_rps: float, curve: HarvestCurve
) -> float:
    """Offline requests a second of all replicas beside these online loads, as many as the queue
    has the time for, less those that run again."""
    engines_rps = float(curve.offline_rps(loads_rps).sum())
    return max(0.0, min(engines_rps, most_rps) - redone_rps)


def _work(
    outcomes: Sequence[JobOutcome],
    curves: Mapping[str, HarvestCurve],
    useful_rps: Callable[[HarvestCurve], float],
    start_s: float,
    slot_s: float,
) -> tuple[float, float]:
    """Work off jobs in one slot; returns the share of it no job needed, and the tokens done."""
    left, tokens = 1.0, 0.0
    for outcome in outcomes:
        job = outcome.job
        if left <= 0 or outcome.finish_s is not None or job.submit_s > start_s:
            continue
        capacity = useful_rps(curves[job.name]) * slot_s
        missing = job.num_requests - outcome.num_done
        done = min(missing, capacity * left)
        outcome.num_done += done
        tokens += done * curves[job.name].tokens_per_request
        if start_s < job.deadline_s:
            outcome.num_done_at_deadline = outcome.num_done
        used = done / capacity if capacity > 0 else left
        left -= used
        if outcome.num_done >= job.num_requests - 1e-9:
            outcome.finish_s = start_s + (1 - left) * slot_s
    return max(0.0, left), tokens


def separate_replicas(jobs: Sequence[Job], offline_rps: Mapping[str, float]) -> float:
    """Replicas of a batch cluster of its own that would meet every deadline.

    `offline_rps`: requests a second of one such replica, by job. The demand bound of earliest
    deadline first: for every interval from a submission to a deadline, the work of jobs that
    lie within it, over its length.
    """
    most = 0.0
    for start_s in {job.submit_s for job in jobs}:
        for end_s in {job.deadline_s for job in jobs if job.deadline_s > start_s}:
            seconds = sum(
                job.num_requests / offline_rps[job.name]
                for job in jobs
                if job.submit_s >= start_s and job.deadline_s <= end_s
            )
            most = max(most, seconds / (end_s - start_s))
    return most
