"""The simulated engine: events in, steps and tokens out, on a virtual clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from conserve.metrics.first_tokens import EndedStep, FirstTokens, Parts, kind_of
from conserve.sim.cost import Clockwork, CostModel, Machine
from conserve.sim.counters import Counters
from conserve.sim.events import EventKind, EventQueue
from conserve.sim.places import Places
from conserve.sim.request import SimRequest
from conserve.sim.schedulers import Scheduler
from conserve.sim.state import EngineState
from conserve.sim.step import Step

OnFinish = Callable[[SimRequest, float], Iterable[SimRequest]]
"""Called with each request that finishes; returns the requests that arrive because of it."""


class Engine:
    """One replica. At most one step runs; with async scheduling the next is decided meanwhile.

    A stoppable step never has a decided successor: what it does may not come to pass.
    """

    def __init__(
        self,
        machine: Machine,
        cost: CostModel,
        scheduler: Scheduler,
        *,
        seed: int = 0,
        strict_classes: bool = True,
        async_scheduling: bool = False,
        on_finish: OnFinish | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        self.now_s = -math.inf
        """Time of the last event."""
        self.machine = machine
        self.scheduler = scheduler
        self.places = Places(machine, class_aware=scheduler.class_aware)
        scheduler.joins(self.places)
        self.state = EngineState(self.places, strict_classes=strict_classes)
        self.link = self.places.link
        self._async = async_scheduling
        self._clockwork = Clockwork(cost, machine, seed)
        self._events = EventQueue()
        self._running: Step | None = None
        self._next: Step | None = None
        self._decides = False
        """Whether a SCHEDULE event is on its way."""
        self._waits = FirstTokens()
        self.first_token_parts: list[Parts] = []
        """What each online first token waited for, in the order in which they came."""
        self._on_finish = on_finish
        self._on_step = on_step
        self._handlers: dict[EventKind, Callable[[object], None]] = {
            EventKind.STEP_END: self._step_end,
            EventKind.RESTORED: self._restored,
            EventKind.ARRIVAL: self._arrival,
            EventKind.JUDGE: self._judge,
            EventKind.SCHEDULE: self._schedule,
        }

    @property
    def counters(self) -> Counters:
        counters = self.places.counters
        counters.checkpointed_tokens = self.link.num_checkpointed_tokens
        counters.restored_tokens = self.link.num_restored_tokens
        return counters

    @property
    def next_event_s(self) -> float:
        """Time of the next event; infinity when nothing is left to happen."""
        return self._events.next_s

    def submit(self, request: SimRequest) -> None:
        """The request reaches the engine at its `arrival_s`."""
        self._events.push(request.arrival_s, EventKind.ARRIVAL, request)

    def run(self, until_s: float = math.inf) -> None:
        """Handle every event up to `until_s`, inclusive, or until there is none."""
        events, handlers = self._events, self._handlers
        while events and events.next_s <= until_s:
            self.now_s, kind, payload = events.pop()
            handlers[kind](payload)

    # Events

    def _arrival(self, request: object) -> None:
        assert isinstance(request, SimRequest)
        self.places.arrive(request)
        if request.online:
            self._waits.arrived(request.request_id, request.arrival_s, self.now_s)
        if self._running is None:
            self._decide_at(self.now_s + self.machine.gap_s)
        elif request.online:
            # Behind a stoppable step none is decided, so that one of the two is asked at most.
            step = self._next or self._running
            if step.stoppable and not step.stopped:
                self._consider_stop(step)

    def _judge(self, step: object) -> None:
        """Those who came during the step have waited for it for as long as they may, if nobody has
        come since: then it was judged anew."""
        assert isinstance(step, Step)
        runs = step is self._running or step is self._next
        if runs and not step.stopped and step.judged_s == self.now_s:
            self._consider_stop(step)

    def _consider_stop(self, step: Step) -> None:
        stop_s = self.scheduler.stop_at_s(self.places, step, self.now_s)
        if stop_s > self.now_s:
            if step is self._next or stop_s < step.end_s:
                step.judged_s = stop_s
                self._events.push(stop_s, EventKind.JUDGE, step)
            return
        step.asked_s = self.now_s
        if step is self._next:
            # It has not begun, and stops at its first look.
            step.stopped = True
            return
        layers = step.layers_between_looks
        layer_s = step.seconds / self.machine.num_layers
        begin_s = step.start_s + step.wait_s
        looks = max(0, math.ceil((self.now_s - begin_s) / (layer_s * layers) - 1e-9))
        stop_s = max(self.now_s, begin_s + looks * layers * layer_s)
        if stop_s < step.end_s:
            step.stopped = True
            step.end_s = stop_s
            self._events.push(stop_s, EventKind.STEP_END, step)

    def _step_end(self, step: object) -> None:
        if step is not self._running:
            # The end that a stop has forestalled.
            return
        assert isinstance(step, Step)
        self._running = None
        self._waits.ended(self._ended(step))
        if step.stopped:
            self.state.drop(step)
        else:
            self.state.complete(step, self.now_s)
            self._take_first_tokens(step)
        self.places.counters.busy_s += self.now_s - step.start_s
        self.scheduler.ended(self.places, step, self.now_s)
        if self._on_step:
            self._on_step(step)
        if self._on_finish and not step.stopped:
            for request in step.finishing:
                for other in self._on_finish(request, self.now_s):
                    self.submit(other)
        if self._next is not None:
            self._start(self._next)
        else:
            # Also when nothing is left: it is then that vLLM tells the workers who finished,
            # and that the policy sees the engine empty.
            if self.link.has_orders:
                # Of a plan behind this step that had no tokens for anybody.
                self._begin_copies()
            self._decide_at(self.now_s + self.machine.gap_s)

    def _ended(self, step: Step) -> EndedStep:
        """As those see it who wait for a first token."""
        num_online, num_offline = step.num_online_tokens, step.num_offline_tokens
        return EndedStep(
            step.decided_s,
            self.now_s,
            kind_of(step.mode, num_online, num_offline, stoppable=step.stoppable),
            () if step.stopped else step.grants.keys(),
            self.scheduler.online_share(step) if num_online and num_offline else 1.0,
            step.asked_s if step.stopped else math.inf,
        )

    def _take_first_tokens(self, step: Step) -> None:
        for request in step.producers if step.num_online_tokens else ():
            if request.online and len(request.token_times_s) == 1:
                parts = self._waits.first_token(request.request_id, self.now_s)
                self.first_token_parts.append(parts)

    def _restored(self, request: object) -> None:
        assert isinstance(request, SimRequest)
        self.places.restored(request)
        if self._running is None:
            self._decide_at(self.now_s + self.machine.gap_s)

    def _schedule(self, _: object) -> None:
        self._decides = False
        in_flight = self._running
        if in_flight is not None and in_flight.stoppable:
            self.scheduler.held_back(self.places, self.now_s)
            return
        plan = self.scheduler.plan(self.places, self.now_s)
        if not (plan.grants or plan.displace or plan.restore or plan.checkpoint):
            return
        kept = in_flight.grants if in_flight and self.scheduler.keeps_in_flight else ()
        before = self.places.counters.num_preempted, len(self.places.restoring)
        step = self.state.apply(plan, self.scheduler.model, kept)
        if not step.grants:
            after = self.places.counters.num_preempted, len(self.places.restoring)
            if in_flight is None:
                ready_s = self._begin_copies()
                if plan.displace or after != before:
                    # Whom room was made for comes next, or who has room beside the restored.
                    self._decide_at(ready_s)
            return
        if step.shape is not plan.shape:
            step.predicted_s = self.scheduler.predict_s(step.shape)
        step.decided_s = self.now_s
        if in_flight is None:
            step.expected_start_s = self.now_s
            self._start(step)
        else:
            expected_end_s = in_flight.expected_start_s + in_flight.predicted_s
            step.expected_start_s = max(self.now_s, expected_end_s)
            self._next = step

    # Steps

    def _start(self, step: Step) -> None:
        self._next = None
        self._running = step
        step.start_s = self.now_s
        step.wait_s = self._begin_copies() - self.now_s
        num_layers, fixed = self.machine.num_layers, self.machine.safepoint_layers
        if step.stoppable:
            every = fixed or self.scheduler.layers_between_looks(step, num_layers)
            step.layers_between_looks = every
        step.seconds = self._clockwork.step_s(step.shape, step.num_looks(num_layers))
        if not step.predicted_s:
            step.predicted_s = step.seconds
        step.end_s = self.now_s + step.wait_s + (0.0 if step.stopped else step.seconds)
        self._events.push(step.end_s, EventKind.STEP_END, step)
        if self._async:
            self._decide_at(self.now_s)
        if step.expected_start_s != self.now_s:
            # The step before it took more or less than expected.
            step.expected_start_s = self.now_s
            if step.stoppable and not step.stopped:
                self._consider_stop(step)

    def _decide_at(self, time_s: float) -> None:
        if not self._decides:
            self._decides = True
            self._events.push(time_s, EventKind.SCHEDULE)

    def _begin_copies(self) -> float:
        """What has been ordered goes on the link; returns when a forward may begin."""
        ready_s, loads = self.link.begin(self.now_s)
        for done_s, request in loads:
            self._events.push(done_s, EventKind.RESTORED, request)
        return ready_s
