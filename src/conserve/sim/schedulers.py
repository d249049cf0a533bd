"""Who decides a step: here the policy itself, in stock.py vLLM's own scheduler."""

from __future__ import annotations

import math
from itertools import islice
from typing import Protocol

from conserve.core.latency import LatencyModel, StepShape
from conserve.core.learning import Experience
from conserve.core.plan import Plan
from conserve.core.policy import Planner, decide
from conserve.core.settings import PolicySettings
from conserve.core.sharing import arrivals_lack_room, note_sharing
from conserve.core.snapshot import OFFLINE_HEAD, Capacity, Sharing, Snapshot, Targets
from conserve.core.stopping import Arrival, Arrivals, RunningStep, stop_at_s
from conserve.metrics.bound import Crowd
from conserve.metrics.first_tokens import online_share
from conserve.metrics.standing import Standing
from conserve.sim.places import Places
from conserve.sim.remembering import Remembering
from conserve.sim.step import Step


class Scheduler(Protocol):
    """What the engine asks, and what it tells. Times in seconds on the virtual clock."""

    keeps_in_flight: bool
    """Whether blocks that a step in flight writes stay with their request until it has ended: so
    vLLM does it where a KV connector may read them."""

    @property
    def class_aware(self) -> bool:
        """Whether free blocks that only offline requests used are handed out first."""
        ...

    @property
    def model(self) -> LatencyModel | None:
        """What it believes steps take; None where it believes nothing."""
        ...

    def joins(self, places: Places) -> None:
        """The engine is made: called once, before anything else."""

    def plan(self, places: Places, now_s: float) -> Plan: ...

    def held_back(self, places: Places, now_s: float) -> None:
        """In place of a plan, behind a step that may be stopped."""

    def predict_s(self, shape: StepShape) -> float:
        """What it believes a step takes; 0 where it believes nothing."""
        ...

    def online_share(self, step: Step) -> float:
        """What the online part of a step with tokens of both classes takes alone, over what it
        does."""
        ...

    def stop_at_s(self, places: Places, step: Step, now_s: float) -> float:
        """When to stop the stoppable step that runs for the online requests that have come since
        it was decided: now, later, or never (infinity)."""
        ...

    def layers_between_looks(self, step: Step, num_layers: int) -> int:
        """At the stop signal, in a stoppable step that begins."""
        ...

    def ended(self, places: Places, step: Step, now_s: float) -> None:
        """After the step's outcome has been applied."""


class ConserveScheduler:
    """`core.decide`, fed as the engine feeds it: recalibrated model, measured traffic."""

    keeps_in_flight = True

    def __init__(
        self,
        model: LatencyModel,
        targets: Targets,
        settings: PolicySettings | None = None,
        *,
        can_stop: bool = True,
    ) -> None:
        self.targets = targets
        self.settings = settings or PolicySettings()
        self.can_stop = can_stop
        self.experience = Experience(model, mean_error=model.margin / 2)
        self.planner: Planner = decide
        """The policy; a test looks on by putting its own in this place."""
        self._standing = Standing()
        self._copy_tokens = 0
        self._error_sum = 0.0
        self._num_errors = 0

    @property
    def class_aware(self) -> bool:
        return self.settings.class_aware

    @property
    def model(self) -> LatencyModel:
        return self.experience.model

    @property
    def mean_error(self) -> float:
        """Mean of |predicted - actual| / actual over the whole steps so far; 0 before the first."""
        return self._error_sum / self._num_errors if self._num_errors else 0.0

    def joins(self, places: Places) -> None:
        places.first_due_s = self.targets.first_due_s
        self._remembering = Remembering(places, self.settings, self.experience)

    def plan(self, places: Places, now_s: float) -> Plan:
        self.experience.schedules(now_s, online_resident=places.num_online > 0)
        self._copy_tokens = places.link.copy_tokens(now_s)
        plan = self.planner(self.snapshot(places, now_s), self.model, self.settings)
        self.experience.decided(plan)
        places.put_online_first()
        return plan

    def held_back(self, places: Places, now_s: float) -> None:
        self.experience.stop_gap.held_back()
        self.experience.schedules(now_s, online_resident=places.num_online > 0)

    def snapshot(self, places: Places, now_s: float) -> Snapshot:
        machine, traffic, link = places.machine, self.experience.traffic, places.link
        waiting_offline = [*places.holding, *islice(places.waiting_offline, OFFLINE_HEAD)]
        places.note_found(places.waiting_online)
        places.note_found(waiting_offline)
        return Snapshot(
            now_s=now_s,
            running=places.running,
            waiting_online=places.waiting_online,
            waiting_offline=waiting_offline,
            num_free_blocks=places.pool.num_free_blocks,
            num_free_slots=places.num_free_slots,
            block_size=machine.block_size,
            max_step_tokens=machine.max_step_tokens,
            targets=self.targets,
            whole_prompts=not machine.chunked_prefill,
            interruption_rate=traffic.interruption_rate,
            online_residency=traffic.online_residency,
            offline_share=traffic.offline_share,
            can_stop=self.can_stop,
            stop_gap_s=self.experience.stop_gap.seconds,
            copy_tokens=self._copy_tokens,
            copy_tail=link.copy_tail,
            restore_tokens_per_s=link.tokens_per_s,
            restore_queue_s=link.restore_queue_s,
            num_remembered_blocks=self._remembering.room(now_s),
            sharing=_sharing(places),
            capacity=Capacity(machine.max_adapters),
        )

    def predict_s(self, shape: StepShape) -> float:
        return self.model.predict_s(shape)

    def online_share(self, step: Step) -> float:
        return online_share(self.model, step.online_shape, step.shape)

    def stop_at_s(self, places: Places, step: Step, now_s: float) -> float:
        # Those that waited before lack room that this step does not give them.
        waiting = [r for r in places.waiting_online if r.arrival_s > step.decided_s]
        if not waiting:
            return math.inf
        return stop_at_s(
            RunningStep(
                step.expected_start_s,
                step.predicted_s,
                step.online_shape,
                step.due_s,
                step.forced_tokens,
            ),
            Arrivals.of(
                [Arrival(r.arrival_s, r.num_tokens, self.targets.ttft_of(r)) for r in waiting]
            ),
            step.model or self.model,
            now_s=now_s,
            patience=self.settings.patience,
        )

    def layers_between_looks(self, step: Step, num_layers: int) -> int:
        return self.experience.look_cost.layers_between(step.predicted_s, num_layers)

    def ended(self, places: Places, step: Step, now_s: float) -> None:
        work_left = bool(places.running)
        self.experience.stop_gap.stepped(step.start_s, now_s, work_left=work_left)
        self._stand(places, step, now_s)
        if step.stopped:
            self.experience.stopped(now_s)
            return
        num_offline = step.shape.num_tokens - step.num_online_tokens
        looks = step.num_looks(places.machine.num_layers)
        lesson = self.experience.ended(step.shape, num_offline, step.start_s, now_s, looks)
        if lesson:
            self._error_sum += abs(lesson.seconds - lesson.predicted_s) / lesson.seconds
            self._num_errors += 1

    def _stand(self, places: Places, step: Step, now_s: float) -> None:
        stood = self._standing.step(
            now_s,
            now_s - step.start_s,
            step.online_shape,
            step.shape.less(step.online_shape),
            self.model,
            crowd=_crowd(places),
            max_tokens=places.machine.max_step_tokens,
            stopped=step.stopped,
        )
        counters = places.counters
        counters.chat_s += stood.chat_s
        counters.chat_alone_s += stood.alone_s
        counters.bound_tokens += stood.bound_tokens


def _crowd(places: Places) -> Crowd:
    held = [request.num_blocks for request in places.running if not request.online]
    return Crowd(
        len(held),
        sum(held),
        len(places.waiting_offline),
        places.pool.num_free_blocks,
        places.num_free_slots,
    )


def _sharing(places: Places) -> Sharing:
    """Who shares blocks, where an arrival may need them."""
    size, free = places.machine.block_size, places.pool.num_free_blocks
    waiting, running = places.waiting_online, places.running
    if not arrivals_lack_room(waiting, running, free, places.num_free_slots, size):
        return Sharing()
    offline = (request.request_id for request in places.running if not request.online)
    lasting = {
        request.request_id: places.num_lasting(request)
        for request in places.waiting_online
        if request.num_borrowed_blocks
    }
    return note_sharing(((name, places.pool.table(name)) for name in offline), lasting)
