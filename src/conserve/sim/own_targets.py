"""Targets where a scenario or a plan names none: those that an engine on this machine takes."""

from __future__ import annotations

from typing import TypeVar

from conserve.metrics.machine_targets import ChosenTargets, choose_targets
from conserve.sim.cost import profiled_model
from conserve.sim.planning import PlanFile
from conserve.sim.profiles import Profile
from conserve.workload import Scenario
from conserve.workload.scenario import TargetTable

Asked = TypeVar("Asked", Scenario, PlanFile)


def own_targets(profile: Profile) -> ChosenTargets:
    """As the start-up profile of an engine there would give them."""
    return choose_targets(profiled_model(profile.cost, profile.machine.max_step_tokens))


def with_targets(asked: Asked, profile: Profile) -> Asked:
    """The same with the machine's targets, unless it names its own."""
    if "targets" in asked.model_fields_set:
        return asked
    targets = own_targets(profile).targets
    table = TargetTable(ttft_ms=1e3 * targets.ttft_s, tbt_ms=1e3 * targets.tbt_s)
    return asked.model_copy(update={"targets": table})


def describe(profile: Profile) -> list[str]:
    """For those who named none: one line each."""
    chosen = own_targets(profile)
    return [
        f"TTFT target {1e3 * chosen.targets.ttft_s:g} ms, {chosen.ttft_reason}",
        f"TBT target {1e3 * chosen.targets.tbt_s:g} ms, {chosen.tbt_reason}",
    ]
