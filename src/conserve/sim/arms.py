"""The arms of the benchmark, as they run here: who decides, and which classes are sent.

Names are the benchmark's, so that one scenario file runs in both; some arms exist only here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from conserve.core.settings import CHAT_SLOWDOWN, PolicySettings
from conserve.core.snapshot import Targets
from conserve.sim.cost import Machine, profiled_model
from conserve.sim.profiles import Profile
from conserve.sim.schedulers import ConserveScheduler, Scheduler
from conserve.sim.stock import StockScheduler
from conserve.workload import ScenarioError, unknown_name


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to serve the two classes of a workload.

    stock: vLLM's own scheduler decides, not the policy.
    by_class: online requests come first in the queue, and offline ones yield blocks first.
    checkpoints: the host link is used where the machine has one; else a displaced request
    computes again.
    """

    name: str
    shows: str
    stock: bool = False
    online: bool = True
    offline: bool = True
    by_class: bool = True
    can_stop: bool = True
    checkpoints: bool = True
    settings: PolicySettings = field(default_factory=PolicySettings)

    def scheduler(self, profile: Profile, targets: Targets) -> Scheduler:
        if self.stock:
            return StockScheduler(by_class=self.by_class)
        settings, machine = self.settings, profile.machine
        if settings.fixed_step_tokens:
            budget = machine.fixed_step_tokens or settings.fixed_step_tokens
            settings = replace(settings, fixed_step_tokens=min(budget, machine.max_step_tokens))
        model = profiled_model(profile.cost, profile.machine.max_step_tokens)
        return ConserveScheduler(model, targets, settings, can_stop=self.can_stop)

    def machine(self, machine: Machine) -> Machine:
        if self.checkpoints and not self.stock:
            return machine
        return replace(machine, link_bytes_per_s=0.0)


ONLINE_ONLY = "online-only"
BOUND = "fcfs"
TARGETS_ALONE = PolicySettings(chat_slowdown=CHAT_SLOWDOWN["greedy"])
"""As the paper has it: nothing but the targets says how slow chat may get."""
WHOLE_STEP = 2**20
"""More tokens than any machine's step: a fixed budget of the machine's own maximum."""


def _stock(
    name: str, shows: str, *, online: bool = True, offline: bool = True, by_class: bool = True
) -> Arm:
    return Arm(name, shows, True, online, offline, by_class, can_stop=False, checkpoints=False)


SLOWDOWNS = (1.25, 2.0, 3.0)
"""Bounds on chat's slowdown that have an arm each: with the levels, the points of the curve."""


def slowed(times: float) -> str:
    """The arm's name."""
    return f"conserve-{times:g}x"


def _slowed(name: str, bound: str, times: float) -> Arm:
    shows = f"ConServe with --chat-slowdown {bound}."
    return Arm(name, shows, settings=PolicySettings(chat_slowdown=times))


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        _stock(ONLINE_ONLY, "Stock vLLM with the online requests alone.", offline=False),
        _stock(BOUND, "Stock vLLM, first come first served: the offline bound.", by_class=False),
        _stock("priority", "Stock vLLM with --scheduling-policy priority."),
        _stock("offline-only", "Stock vLLM with the offline requests alone.", online=False),
        Arm("conserve", "ConServe as it comes."),
        *(
            _slowed(f"conserve-{level}", level, CHAT_SLOWDOWN[level])
            for level in ("gentle", "greedy")
        ),
        *(_slowed(slowed(times), f"{times:g}", times) for times in SLOWDOWNS),
        Arm("conserve-online-only", "ConServe with the online requests alone.", offline=False),
        Arm(
            "conserve-fixed-budget",
            "A fixed token budget a step instead of the latency targets.",
            settings=PolicySettings(fixed_step_tokens=512),
        ),
        Arm(
            "conserve-no-displacement",
            "A waiting online request does not displace running offline ones.",
            settings=PolicySettings(displacement=False),
        ),
        Arm(
            "conserve-forgetful",
            "No memory is kept for conversations that pause.",
            settings=PolicySettings(class_aware=False, room_max_share=0.0),
        ),
        Arm(
            "conserve-no-retention",
            "Free blocks are handed out the least recently used first, whoever used them.",
            settings=PolicySettings(class_aware=False),
        ),
        Arm(
            "conserve-no-room",
            "Offline work may hold every block that no chat runs in.",
            settings=PolicySettings(room_max_share=0.0),
        ),
        Arm("conserve-no-stop", "A step that has begun runs to its end.", can_stop=False),
        Arm(
            "conserve-recompute",
            "No checkpoints: what is displaced computes again.",
            checkpoints=False,
        ),
        Arm("conserve-offline-only", "ConServe with the offline requests alone.", online=False),
        Arm(
            "conserve-offline-only-recompute",
            "That without checkpoints.",
            online=False,
            checkpoints=False,
        ),
        Arm(
            "sarathi-p",
            "The paper's baseline: a fixed budget, preemption between steps, recompute.",
            can_stop=False,
            checkpoints=False,
            settings=PolicySettings(fixed_step_tokens=WHOLE_STEP),
        ),
        Arm(
            "sarathi-p-targets",
            "Sarathi-P with steps sized by the targets: the paper's first part added.",
            can_stop=False,
            checkpoints=False,
            settings=TARGETS_ALONE,
        ),
        Arm(
            "sarathi-p-targets-stop",
            "That with stops inside a step: the paper's first two parts added.",
            checkpoints=False,
            settings=TARGETS_ALONE,
        ),
    )
}


def arm_named(name: str) -> Arm:
    """Raises ScenarioError."""
    if name not in ARMS:
        raise ScenarioError(unknown_name("arm", name, list(ARMS)))
    return ARMS[name]
