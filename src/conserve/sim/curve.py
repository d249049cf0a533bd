"""What each bound on chat's slowdown gives one replica of a planned service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from conserve.core.snapshot import Targets
from conserve.metrics import RunSummary
from conserve.sim.arms import ARMS, BOUND, ONLINE_ONLY, SLOWDOWNS, slowed
from conserve.sim.harvest import Load, at_rate
from conserve.sim.planning import PlanFile, online_lengths, service_rates
from conserve.sim.profiles import load_profile

ON_CURVE = ("conserve-gentle", *map(slowed, SLOWDOWNS), "conserve", "conserve-greedy")


def curve_runs(
    plan: PlanFile, traces: Mapping[str, Path], targets: Targets
) -> dict[str, RunSummary]:
    """By arm: each point of the curve, chat alone, and first come first served, at the service's
    mean online rate beside the first job.

    Raises ScenarioError, TraceError, ProfileError.
    """
    profile = load_profile(plan.profile)
    mean_rps = float(service_rates(plan, traces).mean()) / plan.replicas
    load = Load(online_lengths(plan.online), plan.jobs[0].lengths.model_dump(), mean_rps)
    return {
        name: at_rate(profile, ARMS[name], targets, load, traces, seed=plan.seed)[0]
        for name in (ONLINE_ONLY, BOUND, *ON_CURVE)
    }
