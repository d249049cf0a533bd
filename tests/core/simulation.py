"""The policy in the simulator: scripted requests, and arrivals when they hurt most."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from conserve.core import invariants
from conserve.core.latency import LatencyModel
from conserve.core.plan import Mode, Plan
from conserve.core.policy import Planner, decide
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import Snapshot, Targets
from conserve.sim.cost import Machine
from conserve.sim.engine import Engine
from conserve.sim.request import SimRequest
from conserve.sim.schedulers import ConserveScheduler
from conserve.sim.step import Step


class LivelockError(AssertionError):
    """P0: work is left, and no step gets on with it."""


def offline(name: str, prompt: int, output: int) -> SimRequest:
    return _arriving(name, 0.0, prompt, output, online=False)


def online(name: str, arrival_s: float, prompt: int, output: int) -> SimRequest:
    return _arriving(name, arrival_s, prompt, output, online=True)


def _arriving(name: str, arrival_s: float, prompt: int, output: int, *, online: bool) -> SimRequest:
    return SimRequest.arriving(
        name,
        online=online,
        arrival_s=arrival_s,
        num_prompt_tokens=prompt,
        num_output_tokens=output,
    )


@dataclass
class Simulation:
    """One engine, whose steps take what `model` says, so that a run has one trace."""

    model: LatencyModel
    machine: Machine
    targets: Targets = field(default_factory=Targets)
    settings: PolicySettings = field(default_factory=PolicySettings)
    can_stop: bool = False
    async_scheduling: bool = False
    intrude: bool = False
    """Whether an online request arrives in the middle of every step that may be stopped."""
    planner: Planner = decide
    check: bool = True
    """Whether every plan must satisfy the invariants."""

    def __post_init__(self) -> None:
        scheduler = ConserveScheduler(
            self.model, self.targets, self.settings, can_stop=self.can_stop
        )
        scheduler.planner = self._plan
        self.engine = Engine(
            self.machine,
            self.model,
            scheduler,
            async_scheduling=self.async_scheduling,
            on_finish=self._finish,
            on_step=self._compare,
        )
        self.num_plans = self.num_intruders = 0
        self.num_refused = 0
        """Planned grants that the engine could not give, for want of room. Not known under async
        scheduling, where the next step is planned before one ends."""
        self._planned = Plan(Mode.IDLE)
        self.submitted: list[SimRequest] = []
        self.finished: list[SimRequest] = []

    def submit(self, requests: Iterable[SimRequest]) -> None:
        for request in requests:
            self.engine.submit(request)
            self.submitted.append(request)

    def run(self, most_plans: int, until: Callable[[], bool] | None = None) -> None:
        """Until all that was submitted is finished, or `until` holds. Raises LivelockError."""
        done = until or (lambda: len(self.finished) == len(self.submitted))
        while not done():
            if self.num_plans > most_plans or self.engine.next_event_s == float("inf"):
                left = [*self.engine.places.live]
                raise LivelockError(f"P0: {left} unfinished after {self.num_plans} plans")
            self.engine.run(self.engine.next_event_s)

    def _plan(self, snapshot: Snapshot, model: LatencyModel, settings: PolicySettings) -> Plan:
        plan = self.planner(snapshot, model, settings)
        self.num_plans += 1
        self._planned = plan
        if self.check:
            invariants.check(snapshot, plan, model, settings)
        if self.intrude and plan.stoppable:
            self.num_intruders += 1
            middle_s = snapshot.now_s + plan.predicted_s / 2
            self.submit([online(f"intruder-{self.num_intruders}", middle_s, prompt=32, output=1)])
        return plan

    def _compare(self, step: Step) -> None:
        self.num_refused += len(self._planned.grants.keys() - step.grants.keys())

    def _finish(self, request: SimRequest, now_s: float) -> Iterable[SimRequest]:
        self.finished.append(request)
        return ()
