"""The life of a step, top to bottom: snapshot, decide, apply, record; then what came of it.

vLLM schedules between `begin` and `scheduled`, and reads the step's output between `computed`
and `delivered` (`scheduler.ConserveScheduler`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from conserve.core.learning import Experience
from conserve.core.plan import Mode, Plan
from conserve.core.policy import Planner, decide
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import OFFLINE_HEAD
from conserve.engine.admission import promote
from conserve.engine.checkpoint.keeping import CheckpointKeeper
from conserve.engine.connector import hand_over
from conserve.engine.drafts import settle
from conserve.engine.first_tokens import FirstTokenParts
from conserve.engine.gauges import Gauges
from conserve.engine.pausing import is_frozen
from conserve.engine.promises import Promises
from conserve.engine.queue import is_online
from conserve.engine.remembering import Remembering
from conserve.engine.scheduler_view import SchedulerView
from conserve.engine.snapshots import Snapshots
from conserve.engine.stats import EngineStats
from conserve.engine.step_times import times_of
from conserve.engine.steps import StepRecord, StepsInFlight, learn
from conserve.engine.stopped import StoppedOutput
from conserve.engine.stopper import Stopper
from conserve.engine.tracing import TraceNotes
from conserve.engine.tracker import RequestTracker
from conserve.metrics.standing import Standing

MOST_HELD_BACK = 3
"""Turns that an online request on its way from the input thread is waited for."""


@dataclass(kw_only=True, eq=False)
class Driver:
    """Drives the policy: the only one that calls it, and that carries its plans out."""

    scheduler: SchedulerView
    settings: PolicySettings
    clock: Callable[[], float]
    stats: EngineStats
    tracker: RequestTracker
    experience: Experience
    snapshots: Snapshots
    remembering: Remembering
    keeper: CheckpointKeeper
    promises: Promises
    stopper: Stopper
    notes: TraceNotes
    dispatch_blocks: bool
    """Whether the engine itself runs the forward, and reads no output before it is back."""

    def __post_init__(self) -> None:
        self.planner: Planner = decide
        """The policy; the start-up profile puts its own script here for a while."""
        self.steps = StepsInFlight()
        self._first_tokens = FirstTokenParts(self.stats, self.experience)
        self.gauges = Gauges(self.scheduler, self.promises, self.tracker, self.stats)
        self._standing = Standing()
        self._num_held_back = 0
        self.last_stopped = False
        """Whether the step whose output was read last was stopped."""

    def came(self, request: Any, arrived_s: float) -> None:
        """A request is about to enter vLLM's scheduler; more input of one that is there counts
        for nothing."""
        if request.request_id not in self.scheduler.requests:
            now_s = self.clock()
            self.keeper.came(request, now_s)
            self.tracker.add(request, arrived_s)
            self.notes.came(request)
            self.stats.count("requests", label="online" if is_online(request) else "offline")
            self._first_tokens.came(request, arrived_s, now_s)

    # Before vLLM schedules

    def begin(self) -> StepRecord:
        """Plan the next step and carry out of the plan what vLLM must find done."""
        now_s = self.clock()
        self.experience.schedules(now_s, online_resident=self.snapshots.online_resident())
        self.keeper.look(now_s)
        self.keeper.take_loaded()
        promote(self.scheduler, OFFLINE_HEAD)
        plan = Plan(Mode.IDLE) if self._must_hold_back() else self._decide(now_s)
        record = self.steps.begin(plan, now_s)
        self.experience.decided(plan)
        self._displace(plan, now_s)
        self.keeper.follow(plan)
        self._put_online_first()
        self.stopper.prepare(record)
        return record

    def _must_hold_back(self) -> bool:
        """Whether to schedule nothing now: while an operator has everything stay as it is, behind a
        stoppable step (async scheduling), or when an online request is on its way from the input
        thread and will be here at once."""
        if is_frozen(self.scheduler):
            return True
        if any(step.plan.stoppable for step in self.steps):
            self.experience.stop_gap.held_back()
            return True
        monitor = self.stopper.monitor
        if monitor.num_pending and (self.last_stopped or not self.snapshots.online_resident()):
            self._num_held_back += 1
            if self._num_held_back <= MOST_HELD_BACK:
                return True
            monitor.forget_pending()
        self._num_held_back = 0
        return False

    def _decide(self, now_s: float) -> Plan:
        snapshot = self.snapshots.take(now_s, can_stop=self.stopper.may_plan)
        plan = self.planner(snapshot, self.experience.model, self.settings)
        if plan.stoppable and not self.stopper.keeps_states_of(plan):
            # Requests start in it beside which it may not be stopped: it is to be a short one.
            snapshot = replace(snapshot, can_stop=False)
            plan = self.planner(snapshot, self.experience.model, self.settings)
        self.gauges.decided(snapshot, plan, self.experience.model)
        self.stats.count("decision_seconds", self.clock() - now_s)
        plan = self.stopper.narrowed(plan)
        if plan.stoppable and self.dispatch_blocks and any(step.ends for step in self.steps):
            # The host keeps close to the device in it: tokens of the step in flight would be
            # read when this one is nearly over. Copies are behind that step on the device, and
            # have their budget from this snapshot alone.
            return Plan(Mode.IDLE, checkpoint=plan.checkpoint)
        return plan

    def _displace(self, plan: Plan, now_s: float) -> None:
        if not plan.displace:
            return
        scheduler, victims = self.scheduler, set(plan.displace)
        chosen = [r for r in scheduler.running if r.request_id in victims]
        chosen = [r for r in chosen if scheduler._request_blocks_can_be_freed(r)]
        gone = {r.request_id for r in chosen}
        scheduler.running = [r for r in scheduler.running if r.request_id not in gone]
        for request in chosen:
            self.stats.count("displaced_tokens", request.num_computed_tokens)
            num_covered = self.keeper.num_covered_tokens(request)
            self.stats.count("displaced_covered_tokens", num_covered)
            self.notes.displaced(request)
            scheduler._preempt_request(request, now_s)
        self.keeper.give_back(victims)
        self.stats.count("displaced_requests", len(chosen))

    def _put_online_first(self) -> None:
        """vLLM grants blocks in the order of `running`; offline requests come last."""
        running = self.scheduler.running
        online = [r for r in running if is_online(r)]
        if 0 < len(online) < len(running):
            self.scheduler.running = online + [r for r in running if not is_online(r)]

    # When vLLM has scheduled

    def scheduled(self, record: StepRecord, output: Any) -> None:
        """Record what the step really holds. It may be less than planned, and more only where
        a grant cannot be cut."""
        requests, num_scheduled = self.scheduler.requests, output.num_scheduled_tokens
        decode_width = self.snapshots.decode_width
        shapes = self.tracker.shape_of(num_scheduled, requests, decode_width)
        record.shape, record.offline_shape = shapes
        record.ends = {name: requests[name].num_computed_tokens for name in num_scheduled}
        self.notes.ran(requests[name] for name in num_scheduled)
        self.remembering.scheduled(output)
        if not output.total_num_scheduled_tokens:
            return
        model = self.experience.model
        # Under async scheduling it begins when the step before it ends.
        record.begins_s = max([record.started_s, *(step.expected_end_s for step in self.steps)])
        record.predicted_s = model.predict_s(record.shape)
        if self.stopper.announce(record, output, self.experience.look_cost):
            self.stopper.monitor.step_started(record.number, record.running(), model)

    # When its output is here

    def computed(self, scheduler_output: Any, model_runner_output: Any) -> StepRecord:
        """Account for the oldest step, or undo it, before vLLM reads its output."""
        record, computed = self.steps.end(), scheduler_output.num_scheduled_tokens
        record.times = times_of(model_runner_output, record.started_s, self.clock())
        monitor, asked = self.stopper.monitor, None
        if record.plan.stoppable:
            asked = monitor.step_ended()
        elif computed:
            self.steps.next_begins(record.times.ended_s)
            monitor.step_begins(record.times.ended_s)
        self.last_stopped = isinstance(model_runner_output, StoppedOutput)
        if not self.last_stopped:
            self._first_tokens.ended(record, computed.keys(), stopped=None)
            output, steps = model_runner_output, (record, *self.steps)
            beside = self.scheduler.num_sampled_tokens_per_step
            refused = settle(scheduler_output, output, steps, self.tracker, self.stats, beside)
            self.tracker.computed(computed, record.ends, self.stats, refused)
            return record
        self._first_tokens.ended(record, (), stopped=asked)
        self.stopper.undo(record, computed)
        self.stopper.count(model_runner_output, sum(computed.values()), asked)
        self.tracker.stopped(computed, record.ends)
        for name in computed:
            if request := self.scheduler.requests.get(name):
                self.notes.stopped(request)
        return record

    def delivered(self, record: StepRecord, outputs: dict[int, Any]) -> None:
        """vLLM has made the clients' outputs: learn from the step, and send its figures."""
        now_s = self.clock()
        for client in outputs.values():
            for one in client.outputs:
                # A pooling model's answer is its first token and its last.
                if one.new_token_ids or one.pooling_output is not None:
                    self.tracker.emitted(one.request_id, len(one.new_token_ids), now_s, self.stats)
                    self._first_tokens.emitted(one.request_id, now_s)
        self._learn(record)
        self._gauge(now_s)
        hand_over(self.scheduler.connector, self.stats, outputs)
        self.tracker.drop_finished(self.scheduler.requests)
        self._first_tokens.drop_finished(self.scheduler.requests)

    def _learn(self, record: StepRecord) -> None:
        """From when the device was done with a step: this clock shows when it was read."""
        if not record.shape.num_tokens:
            return
        assert record.times is not None
        launched_s, ended_s = record.times
        work_left = bool(self.scheduler.running)
        self.experience.stop_gap.stepped(launched_s, ended_s, work_left=work_left)
        self._stand(record, ended_s)
        if self.last_stopped:
            self.experience.stopped(ended_s)
        else:
            learn(self.experience, record, ended_s, self.stats)

    def _stand(self, record: StepRecord, ended_s: float) -> None:
        """How far from alone, and from first come first served, this step was."""
        stood = self._standing.step(
            ended_s,
            self.experience.took_s(record.started_s, ended_s),
            record.shape.less(record.offline_shape),
            record.offline_shape,
            self.experience.model,
            crowd=self.gauges.crowd,
            max_tokens=self.scheduler.max_num_scheduled_tokens,
            stopped=self.last_stopped,
        )
        self.stats.count("chat_seconds", stood.chat_s)
        self.stats.count("chat_alone_seconds", stood.alone_s)
        self.stats.count("bound_tokens", stood.bound_tokens)

    def _gauge(self, now_s: float) -> None:
        self.gauges.look(now_s)
        self.keeper.checkpointer.gauge()
        self.stats.set("interruptions_per_second", self.experience.traffic.interruption_rate)
        if unstopped := self.stopper.monitor.take_unstopped():
            self.stats.count("unstopped_arrivals", unstopped)

    def forget_history(self) -> None:
        """Start counting anew: what the start-up profile did is nobody's traffic."""
        self.experience.forget_traffic()
        self._standing = Standing()
        self.tracker.forget_all()
        self._first_tokens.forget_all()
        self.gauges.forget()
        self.stats.reset()
        if self.scheduler.log_stats:
            self.scheduler.kv_cache_manager.make_prefix_cache_stats()
