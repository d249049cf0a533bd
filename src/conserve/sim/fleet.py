"""Many replicas behind a router, with one queue of offline work: every step of every replica."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal

from conserve.core.snapshot import Targets
from conserve.metrics import RequestRecord
from conserve.sim.arms import Arm
from conserve.sim.client import Client
from conserve.sim.counters import Counters
from conserve.sim.engine import Engine
from conserve.sim.profiles import Profile
from conserve.sim.request import SimRequest
from conserve.workload import RequestPlan, Workload

Router = Literal["round-robin", "least-loaded"]


@dataclass(frozen=True, slots=True)
class FleetOutcome:
    """`counters` and `num_routed` (online requests it was sent), each by replica."""

    records: list[RequestRecord]
    counters: list[Counters]
    num_routed: list[int]


class Fleet:
    """Replicas on one clock. Each takes from the shared queue what its own place allows.

    At equal times the replica of the lower number goes first. `in_flight` offline requests
    are with each replica at a time.
    """

    def __init__(
        self,
        num_replicas: int,
        arm: Arm,
        profile: Profile,
        targets: Targets,
        *,
        router: Router = "least-loaded",
        seed: int = 0,
    ) -> None:
        if num_replicas < 1:
            raise ValueError(f"num_replicas must be at least 1, not {num_replicas}")
        self._router = router
        self._frontend_s = profile.machine.frontend_s
        self._client = Client((), self._frontend_s)
        self._engines = [
            Engine(
                arm.machine(profile.machine),
                profile.cost,
                arm.scheduler(profile, targets),
                seed=seed * num_replicas + number,
                strict_classes=arm.by_class,
                on_finish=self._finished,
            )
            for number in range(num_replicas)
        ]
        self._num_routed = [0] * num_replicas

    def run(self, workload: Workload, start_s: float, end_s: float) -> FleetOutcome:
        """From `start_s`, when the offline queue opens, to `end_s`."""
        self._client = Client(workload.offline, self._frontend_s)
        for engine in self._engines:
            for _ in range(workload.in_flight):
                for request in self._client.next_offline(start_s):
                    engine.submit(request)
        for plan in workload.online:
            if plan.arrival_s > end_s:
                break
            self._advance(plan.arrival_s)
            self._route(plan)
        self._advance(end_s)
        records = [request.record(self._frontend_s) for request in self._client.sent]
        counters = [engine.counters for engine in self._engines]
        return FleetOutcome(records, counters, self._num_routed)

    def _advance(self, until_s: float) -> None:
        """Events of all replicas up to `until_s`, in order of time."""
        heap: list[tuple[float, int]] = []
        for number, engine in enumerate(self._engines):
            heappush(heap, (engine.next_event_s, number))
        while heap and heap[0][0] <= until_s:
            next_s, number = heappop(heap)
            engine = self._engines[number]
            engine.run(next_s)
            heappush(heap, (engine.next_event_s, number))

    def _route(self, plan: RequestPlan) -> None:
        number = self._pick()
        self._num_routed[number] += 1
        self._engines[number].submit(self._client.send(plan, plan.arrival_s))

    def _pick(self) -> int:
        if self._router == "round-robin":
            return sum(self._num_routed) % len(self._engines)
        loads: Sequence[int] = [engine.places.num_online for engine in self._engines]
        least = min(loads)
        # Among equals in turn, or the first would get all requests of a quiet time.
        turn = sum(self._num_routed)
        numbers = range(len(loads))
        return min(
            (number for number in numbers if loads[number] == least),
            key=lambda number: (number - turn) % len(loads),
        )

    def _finished(self, request: SimRequest, now_s: float) -> Iterable[SimRequest]:
        return () if request.online else self._client.next_offline(now_s)
