"""Before deploying: how much offline work a service harvests, and when its jobs are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from conserve.core.snapshot import Targets
from conserve.sim.arms import ARMS
from conserve.sim.harvest import Floats, HarvestCurve, measure
from conserve.sim.profiles import Profile, load_profile
from conserve.sim.slots import Job, SlotsOutcome, run_slots, separate_replicas
from conserve.workload.arrivals import Bursts, Diurnal, Gamma, Opening, Phases, Replay
from conserve.workload.lengths import Lengths
from conserve.workload.scaling import squeezed_rates, time_factor
from conserve.workload.scenario import Online, TargetTable, traces_of
from conserve.workload.table import ScenarioError, Table, read_toml
from conserve.workload.traces import RatePoint, read_rates, read_requests

MOST_HOURS = 24 * 366
"""A year in slots of a few seconds is worked out in memory."""


class JobTable(Table):
    """A batch: submitted and wanted so many hours after the start."""

    name: str
    num_requests: int = Field(ge=1)
    submit_h: float = Field(default=0.0, ge=0)
    deadline_h: float = Field(gt=0)
    lengths: Lengths

    @model_validator(mode="after")
    def _in_order(self) -> JobTable:
        if self.deadline_h <= self.submit_h:
            raise ValueError(f"deadline_h {self.deadline_h} is not after submit_h {self.submit_h}")
        return self


class PlanFile(Table):
    """What `conserve plan` is asked. Rates are of the whole service, not of one replica."""

    about: str = ""
    profile: str
    replicas: int = Field(ge=1)
    hours: float = Field(default=24.0, gt=0, le=MOST_HOURS)
    slot_s: float = Field(default=60.0, ge=10)
    seed: int = 1
    targets: TargetTable = TargetTable()
    online: Online
    jobs: tuple[JobTable, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> PlanFile:
        names = [job.name for job in self.jobs]
        if len(names) != len(set(names)):
            raise ValueError("jobs: two have the same name")
        return self

    @model_validator(mode="after")
    def _lies_within_its_hours(self) -> PlanFile:
        """What is due after the end is not known to be late."""
        if self.slot_s > 3600 * self.hours:
            raise ValueError(f"slot_s {self.slot_s:g} is longer than the plan's {self.hours:g} h")
        for job in self.jobs:
            if job.deadline_h > self.hours:
                due = f"deadline_h {job.deadline_h:g} of {job.name!r}"
                raise ValueError(f"{due} is after the plan's {self.hours:g} h: raise hours")
        return self

    @model_validator(mode="after")
    def _requests_stand_alone(self) -> PlanFile:
        """A rate of requests is what a plan is about: conversations have none of their own."""
        if self.online.sessions:
            raise ValueError("online.sessions: a plan has no conversations: give online.lengths")
        if isinstance(self.online.arrivals, Opening):
            raise ValueError("online.arrivals: kind 'opening' has no rate: use 'gamma'")
        return self

    def trace_names(self) -> list[str]:
        """Names of the traces that must be given by path, in order of first use."""
        lengths = (job.lengths for job in self.jobs)
        return traces_of([self.online.arrivals, self.online.lengths, *lengths])


@dataclass(frozen=True, slots=True)
class PlanOutcome:
    """One set of targets. `separate_replicas` and those of the service are of the same machine."""

    targets: Targets
    slots: SlotsOutcome
    curves: Mapping[str, HarvestCurve]
    separate_replicas: float


def load_plan(path: Path) -> PlanFile:
    """Raises ScenarioError for a file that cannot be read or a field that cannot be used."""
    return PlanFile.of(read_toml(path), str(path))


def work_out(plan: PlanFile, traces: Mapping[str, Path], targets: Targets) -> PlanOutcome:
    """Measure a replica at these targets, then spread the service's day over all of them.

    Raises ScenarioError, TraceError, ProfileError.
    """
    profile = load_profile(plan.profile)
    rates_rps = service_rates(plan, traces)
    busiest = float(rates_rps.max()) / plan.replicas
    # Four standard deviations of a slot's Poisson count above its mean: never seen in practice.
    most_rps = busiest + 4 * (busiest / plan.slot_s) ** 0.5
    curves, alone = {}, {}
    for job in plan.jobs:
        lengths = job.lengths.model_dump()
        online = online_lengths(plan.online)
        curves[job.name] = measure(
            profile, ARMS["conserve"], targets, online, lengths, most_rps, traces, seed=plan.seed
        )
        alone[job.name] = _alone_rps(profile, targets, lengths, traces, plan.seed)
    jobs = [
        Job(job.name, job.num_requests, job.deadline_h * 3600, job.submit_h * 3600)
        for job in plan.jobs
    ]
    slots = run_slots(rates_rps, plan.slot_s, plan.replicas, jobs, curves, seed=plan.seed)
    return PlanOutcome(targets, slots, curves, separate_replicas(jobs, alone))


def _alone_rps(
    profile: Profile,
    targets: Targets,
    lengths: Mapping[str, Any],
    traces: Mapping[str, Path],
    seed: int,
) -> float:
    """Requests a second of a replica that serves the job and nothing else, with stock vLLM."""
    arm = ARMS["offline-only"]
    curve = measure(profile, arm, targets, {}, lengths, 0.0, traces, seed=seed)
    return curve.points[0].offline_rps


def online_lengths(online: Online) -> dict[str, Any]:
    """The lengths of a scenario's online requests, as a table; a replayed trace's are drawn."""
    arrivals = online.arrivals
    if isinstance(arrivals, Replay):
        return {"kind": "trace", **arrivals.model_dump(exclude={"kind", "rate_rps", "keep_share"})}
    assert online.lengths is not None  # Online checks it
    return online.lengths.model_dump()


def service_rates(plan: PlanFile, traces: Mapping[str, Path]) -> Floats:
    """Online requests a second in each slot. Raises ScenarioError, TraceError."""
    duration_s = plan.hours * 3600
    starts_s = np.arange(0.0, duration_s, plan.slot_s)
    arrivals = plan.online.arrivals
    if isinstance(arrivals, Replay):
        return _binned(arrivals, plan, traces)
    assert not isinstance(arrivals, Opening)  # PlanFile checks it
    try:
        points = _rate_points(arrivals, duration_s, traces)
    except ValueError as error:
        raise ScenarioError(f"online.arrivals: {error}") from error
    edges = np.array([point.start_s for point in points])
    rates = np.array([point.rate_rps for point in points])
    middles = starts_s + plan.slot_s / 2
    last_begun = np.maximum(0, np.searchsorted(edges, middles, side="right") - 1)
    return np.asarray(rates[last_begun], dtype=np.float64)


def _rate_points(
    arrivals: Bursts | Phases | Gamma | Diurnal, duration_s: float, traces: Mapping[str, Path]
) -> Sequence[RatePoint]:
    match arrivals:
        case Gamma():
            return [RatePoint(0.0, arrivals.rate_rps)]
        case Bursts():
            return [RatePoint(0.0, arrivals.num_requests / duration_s)]
        case Phases():
            return arrivals.points(duration_s)
        case Diurnal():
            return squeezed_rates(
                read_rates(traces[arrivals.trace]),
                arrivals.trace_start_s,
                arrivals.trace_seconds,
                duration_s,
                arrivals.rate_rps,
            )


def _binned(arrivals: Replay, plan: PlanFile, traces: Mapping[str, Path]) -> Floats:
    """A request trace's own rate over time, from its start, at the mean rate wanted."""
    rows = read_requests(traces[arrivals.trace], arrivals.spelling)
    factor = time_factor(rows, arrivals.rate_rps)
    duration_s = plan.hours * 3600
    if rows[-1].arrival_s * factor < duration_s:
        hours = rows[-1].arrival_s * factor / 3600
        raise ScenarioError(
            f"the trace {arrivals.trace!r} holds {hours:.2g} h at this rate and the plan has "
            f'{plan.hours:g}: lower hours or rate_rps, or give rates (kind = "diurnal")'
        )
    edges = np.arange(0.0, duration_s + plan.slot_s, plan.slot_s)
    times_s = rows.arrival_s * factor
    # The last bin would hold its end too.
    counts, _ = np.histogram(times_s[times_s < edges[-1]], bins=edges)
    return np.asarray(counts / plan.slot_s, dtype=np.float64)
