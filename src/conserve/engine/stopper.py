"""Which steps may be stopped, how the workers learn of it, and how a stopped one is undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from conserve.core.looks import LookCost, num_looks
from conserve.core.plan import Plan
from conserve.engine.alarm import Alarm
from conserve.engine.beside import others_have_work, our_metadata
from conserve.engine.capabilities import (
    layers_between_safepoints,
    num_layers,
    passes_safepoints,
    why_not_stoppable,
)
from conserve.engine.connector import find_ours
from conserve.engine.flag import StopFlag, flag_name
from conserve.engine.kept_states import most_running, stranded, touched
from conserve.engine.monitor import ArrivalMonitor, AskedStop
from conserve.engine.pausing import admits_new
from conserve.engine.promises import Promises
from conserve.engine.scheduler_view import SchedulerView
from conserve.engine.settings import EngineSettings
from conserve.engine.stats import EngineStats
from conserve.engine.steps import StepRecord
from conserve.engine.stopped import Before, StoppedOutput, roll_back


class Stopper:
    """The scheduler's side of stopping, in the order in which a step meets it."""

    def __init__(
        self,
        scheduler: SchedulerView,
        settings: EngineSettings,
        promises: Promises,
        stats: EngineStats,
        clock: Callable[[], float],
        make_alarm: Callable[..., Alarm] = Alarm,
    ) -> None:
        self._scheduler = scheduler
        self._settings = settings
        self._stats = stats
        self._clock = clock
        self._others_busy = False
        """Whether the last step asked anything of a connector beside ours."""
        self.flag = StopFlag(flag_name(scheduler.vllm_config))
        self.flag.reset()
        patience = settings.effective_policy.patience
        self.monitor = ArrivalMonitor(self.flag, clock, promises, patience, make_alarm)
        has_connector = find_ours(scheduler.connector) is not None
        self.why_off = why_not_stoppable(scheduler, settings, has_connector=has_connector)
        """Why this engine can stop no step at all; nothing if it can."""
        self._most_running = most_running(scheduler)

    @property
    def may_plan(self) -> bool:
        """Whether the next step may be planned as one that can be stopped: what a connector was
        asked once it will likely be asked again, a paused engine stops for nobody, and recurrent
        state is copied of so many requests only."""
        may = not self.why_off and not self._others_busy and admits_new(self._scheduler)
        return may and len(self._scheduler.running) <= self._most_running

    def keeps_states_of(self, plan: Plan) -> bool:
        """Whether there is room to copy the recurrent state of all requests in the plan: those that
        it starts may bring some from the prefix cache or the host."""
        return len(plan.grants) <= self._most_running

    def narrowed(self, plan: Plan) -> Plan:
        """The plan, not stoppable where its step would look at no safepoint, or could not be put
        back."""
        if not plan.stoppable:
            return plan
        looks = passes_safepoints(self._scheduler.vllm_config, plan.grants)
        return plan if looks and self.keeps_states_of(plan) else replace(plan, stoppable=False)

    def prepare(self, record: StepRecord) -> None:
        """Note what vLLM is about to change, before it schedules."""
        if record.plan.stoppable:
            requests = self._scheduler.requests
            record.before = {name: Before.of(requests[name]) for name in record.plan.grants}

    def announce(self, record: StepRecord, output: Any, look_cost: LookCost) -> bool:
        """vLLM has scheduled tokens: tell the workers that the step may be stopped, and how often
        to look. Returns whether it may be: not if another connector has work in it."""
        self._others_busy = others_have_work(output.kv_connector_metadata)
        if not record.plan.stoppable:
            return False
        if self._others_busy:
            record.plan = replace(record.plan, stoppable=False)
            return False
        for name, num_tokens in output.num_scheduled_tokens.items():
            request = self._scheduler.requests[name]
            record.before[name].scheduled(request, num_tokens, self._scheduler.kv_cache_manager)
        ours = our_metadata(output.kv_connector_metadata)
        ours.stoppable_step = record.number
        ours.states = touched(self._scheduler, output.num_scheduled_tokens)
        config = self._scheduler.vllm_config
        ours.every = layers_between_safepoints(
            config, self._settings, record.plan.predicted_s, look_cost
        )
        record.num_looks = num_looks(num_layers(config), ours.every)
        return True

    def undo(self, record: StepRecord, computed: dict[str, int]) -> None:
        """Roll the stopped step back; `computed` is what it was to compute. Requests whose
        computed prefix never came into being, or whose recurrent state was taken too far, go back
        to the queue."""
        scheduler = self._scheduler
        for request_id in roll_back(scheduler, computed, record.before):
            request = scheduler.requests[request_id]
            scheduler.running.remove(request)
            request.num_computed_tokens = 0  # nothing of it is worth copying
            scheduler._preempt_request(request, self._clock())
        for request in [r for r in scheduler.running if r.request_id in computed]:
            if stranded(scheduler, request):
                scheduler.running.remove(request)
                scheduler._preempt_request(request, self._clock())

    def count(self, output: StoppedOutput, num_dropped: int, asked: AskedStop | None) -> None:
        """Account for a stopped step."""
        stats = self._stats
        stats.count("stopped_steps")
        stats.count("stopped_layers", output.layers_done)
        stats.count("dropped_tokens", num_dropped)
        if asked is not None:
            stats.observe("stop_response_seconds", self._clock() - asked.at_s)
            stats.observe("stop_response_layers", output.layers_done - asked.layer)

    def close(self) -> None:
        self.monitor.close()
        self.flag.unlink()
