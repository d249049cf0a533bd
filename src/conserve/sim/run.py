"""One workload under one arm: the same loads, window and records as the benchmark's client."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from conserve.core.snapshot import Targets
from conserve.metrics import UNFINISHED, RequestRecord
from conserve.sim.arms import Arm
from conserve.sim.client import Client
from conserve.sim.counters import Counters
from conserve.sim.engine import Engine
from conserve.sim.profiles import Profile
from conserve.sim.request import Phase, SimRequest
from conserve.sim.schedulers import ConserveScheduler
from conserve.sim.step import Step
from conserve.workload import Window, Workload


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run gave. `counters` are those of the whole run, `in_window` those of the window."""

    records: list[RequestRecord]
    counters: Counters
    in_window: Counters
    engine: Engine

    @property
    def chat_slowdown(self) -> float | None:
        """What the policy says that it is, over the window; None where it says nothing."""
        counted = self.in_window
        return counted.chat_s / counted.chat_alone_s if counted.chat_alone_s else None

    @property
    def harvest_share(self) -> float | None:
        """The same of its share of what first come first served would harvest."""
        counted = self.in_window
        return counted.harvested_tokens / counted.bound_tokens if counted.bound_tokens else None


def simulate(
    workload: Workload,
    arm: Arm,
    profile: Profile,
    targets: Targets,
    window: Window,
    *,
    seed: int = 0,
    async_scheduling: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Outcome:
    """Run to the last online token, or to the end of the drain. Same arguments, same outcome.

    Raises ValueError for a request that the machine could never finish.
    """
    load = _Load(workload, arm, profile.machine.frontend_s, window)
    engine = Engine(
        arm.machine(profile.machine),
        profile.cost,
        arm.scheduler(profile, targets),
        seed=seed,
        strict_classes=arm.by_class,
        async_scheduling=async_scheduling,
        on_finish=load.finished,
        on_step=on_step,
    )
    for request in load.first():
        engine.submit(request)
    engine.run(0.0)
    begun = replace(engine.counters)
    engine.run(window.duration_s)
    in_window = engine.counters.since(begun)
    end_s = window.duration_s + window.drain_s
    while load.num_online_left and engine.next_event_s <= end_s:
        engine.run(engine.next_event_s)
    counters = engine.counters
    if isinstance(engine.scheduler, ConserveScheduler):
        counters.prediction_error = engine.scheduler.mean_error
    return Outcome(load.records(), counters, in_window, engine)


class _Load:
    """An open loop of online requests, or of conversations whose turns wait for answers, beside a
    closed loop of offline ones."""

    def __init__(self, workload: Workload, arm: Arm, frontend_s: float, window: Window) -> None:
        self._workload = workload
        self._arm = arm
        self._frontend_s = frontend_s
        self._window = window
        self._client = Client(workload.offline if arm.offline else (), frontend_s)
        self.num_online_left = 0

    def first(self) -> Iterable[SimRequest]:
        """Every online request, and the offline ones that are in flight from the start."""
        for _ in range(self._workload.in_flight):
            yield from self._client.next_offline(-self._window.lead_in_s)
        if self._arm.online:
            for plan in self._workload.online:
                self.num_online_left += 1
                yield self._client.send(plan, plan.arrival_s)

    def finished(self, request: SimRequest, now_s: float) -> Iterable[SimRequest]:
        if not request.online:
            return self._client.next_offline(now_s)
        self.num_online_left -= 1
        turn = self._workload.next_turns.get(request.request_id)
        if turn is None or now_s + turn.pause_s >= self._window.duration_s:
            return ()
        self.num_online_left += 1
        return (self._client.send(turn, now_s + turn.pause_s),)

    def records(self) -> list[RequestRecord]:
        records = []
        for request in self._client.sent:
            record = request.record(self._frontend_s)
            if request.online and request.phase is not Phase.FINISHED:
                record.error = UNFINISHED
            records.append(record)
        return records
