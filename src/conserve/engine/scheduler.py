"""vLLM's scheduler under our policy: snapshot, decide, apply, then `super().schedule()`."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from typing import Any

from conserve.core.learning import Experience
from conserve.core.plan import Mode, Plan
from conserve.core.policy import decide
from conserve.engine.capabilities import (
    layers_between_safepoints,
    passes_safepoints,
    why_not_stoppable,
)
from conserve.engine.checkpoint.keeping import KeepsCheckpoints
from conserve.engine.checkpoint.sizes import make_checkpointer
from conserve.engine.connector import StepMetadata, find_ours, spare_others
from conserve.engine.door import AsyncScheduler, init_logger
from conserve.engine.flag import StopFlag, flag_name
from conserve.engine.memory import MemoryGauge
from conserve.engine.monitor import ArrivalMonitor, AskedStop
from conserve.engine.orphan import end_with_parent
from conserve.engine.queue import ClassQueue, is_online
from conserve.engine.settings import EngineSettings
from conserve.engine.snapshots import OFFLINE_HEAD, TakesSnapshots
from conserve.engine.stats import EngineStats, send_with
from conserve.engine.steps import GENERIC_ERROR, GENERIC_MODEL, StepRecord, learn
from conserve.engine.stopped import Before, StoppedOutput, roll_back
from conserve.engine.tracing import TraceNotes
from conserve.engine.tracker import RequestTracker
from conserve.engine.waiting import only_planned, promote

logger = init_logger("vllm.conserve")


class ConserveScheduler(TakesSnapshots, KeepsCheckpoints, AsyncScheduler):  # type: ignore[misc]
    """Online requests first, offline requests in the slack. See docs/design/policy.md."""

    running: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = EngineSettings.of(self.vllm_config.additional_config)
        self.settings = settings
        self.clock = time.time
        """Wall clock, since vLLM's arrival times are."""
        self.experience = Experience(GENERIC_MODEL, GENERIC_ERROR)
        self.tracker = RequestTracker(self.block_size)
        self.planner = decide
        """The policy; the start-up profile puts its own script here for a while."""
        self.waiting = ClassQueue()
        self.kv_holding_waiting = ClassQueue()
        self._policy = settings.effective_policy
        self._decode_width = 1 + self.num_spec_tokens
        self._grants: dict[str, int] = {}
        self._steps: deque[StepRecord] = deque()
        self._step_number = 0
        self._num_held_back = 0
        self._last_stopped = False
        self._memory = MemoryGauge(self.kv_cache_manager)
        self._our_connector = find_ours(self.connector)
        self._own_stats = EngineStats()
        has_connector = self._our_connector is not None
        self.checkpointer = make_checkpointer(self, settings, has_connector=has_connector)
        if self._our_connector is not None:
            self._our_connector.checkpointer = self.checkpointer
        tracing = self.vllm_config.observability_config.otlp_traces_endpoint is not None
        self._notes = TraceNotes(enabled=tracing)
        self._others_busy = False
        """Whether the last step asked anything of a connector beside ours."""
        self.flag = StopFlag(flag_name(self.vllm_config))
        self.flag.reset()
        self.monitor = ArrivalMonitor(
            self.flag, self.clock, settings.slo_ttft_s, self._policy.patience
        )
        reason = why_not_stoppable(self, settings, has_connector=has_connector)
        self.can_stop = not reason
        if reason:
            logger.info("ConServe: steps are not stopped between layers: %s", reason)
        end_with_parent()

    @property
    def stats(self) -> EngineStats:
        """Where figures go: to the API process, or nowhere without our connector to carry them."""
        return self._our_connector.stats if self._our_connector else self._own_stats

    # One step

    def schedule(self, throttle_prefills: bool = False) -> Any:
        now_s = self.clock()
        self.experience.schedules(now_s, online_resident=self._online_resident())
        if self.checkpointer is not None:
            self.checkpointer.stats = self.stats
        self._take_loaded()
        promote(self, OFFLINE_HEAD)
        plan = Plan(Mode.IDLE) if self._must_hold_back() else self._decide(now_s)
        record = StepRecord(self._next_number(), plan, now_s)
        self.experience.decided(plan)
        self._displace(plan, now_s)
        self._follow(plan)
        self._grants = plan.grants
        self._put_online_first()
        if plan.stoppable:
            record.before = {name: Before.of(self.requests[name]) for name in plan.grants}
            self._announce(record)
        with only_planned(self, plan):
            output = super().schedule(throttle_prefills)
        if output.total_num_scheduled_tokens:
            self._others_busy = spare_others(plan, output)
        self._scheduled(record, output)
        return output

    def _next_number(self) -> int:
        self._step_number += 1
        return self._step_number

    def _must_hold_back(self) -> bool:
        """Whether to schedule nothing now: behind a stoppable step (async scheduling), or when
        an online request is on its way from the input thread and will be here at once."""
        if any(step.plan.stoppable for step in self._steps):
            return True
        if self.monitor.num_pending and (self._last_stopped or not self._online_resident()):
            self._num_held_back += 1
            if self._num_held_back <= 3:
                return True
            self.monitor.forget_pending()
        self._num_held_back = 0
        return False

    def _decide(self, now_s: float) -> Plan:
        plan = self.planner(self.snapshot(now_s), self.experience.model, self._policy)
        self.stats.count("decision_seconds", self.clock() - now_s)
        if plan.stoppable and not passes_safepoints(self.vllm_config, plan.grants):
            return replace(plan, stoppable=False)
        return plan

    def _displace(self, plan: Plan, now_s: float) -> None:
        if not plan.displace:
            return
        victims = set(plan.displace)
        chosen = [r for r in self.running if r.request_id in victims]
        chosen = [r for r in chosen if self._request_blocks_can_be_freed(r)]
        gone = {r.request_id for r in chosen}
        self.running = [r for r in self.running if r.request_id not in gone]
        for request in chosen:
            self.stats.count("displaced_tokens", request.num_computed_tokens)
            self.stats.count("displaced_covered_tokens", self._num_covered_tokens(request))
            self._notes.displaced(request)
            self._preempt_request(request, now_s)
        self._give_back(victims)
        self.stats.count("displaced_requests", len(chosen))

    def _put_online_first(self) -> None:
        """vLLM grants blocks in the order of `running`; offline requests come last."""
        online = [r for r in self.running if is_online(r)]
        if 0 < len(online) < len(self.running):
            self.running = online + [r for r in self.running if not is_online(r)]

    def _announce(self, record: StepRecord) -> None:
        """Tell the workers that this step may be stopped, and how often to look."""
        if self._our_connector is not None:
            every = layers_between_safepoints(self, self.settings, record.plan.predicted_s)
            self._our_connector.next_step = StepMetadata(record.number, every)

    def _reserve_prefill_lookahead(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """vLLM asks how many tokens a request may have, right before it allocates blocks."""
        granted = self._grants.get(request.request_id, 0)
        allowed = min(num_new_tokens, granted)
        return int(super()._reserve_prefill_lookahead(request, num_computed_tokens, allowed))

    def _scheduled(self, record: StepRecord, output: Any) -> None:
        record.shape, record.offline_shape = self.tracker.shape_of(
            output.num_scheduled_tokens, self.requests, self._decode_width
        )
        record.ends = {
            name: self.requests[name].num_computed_tokens for name in output.num_scheduled_tokens
        }
        if record.plan.stoppable:
            for name, num_tokens in output.num_scheduled_tokens.items():
                request = self.requests[name]
                record.before[name].scheduled(request, num_tokens, self.kv_cache_manager)
        model = self.experience.model
        predicted_s = model.predict_s(record.shape)
        # Under async scheduling it begins when the step before it ends.
        begins_s = max([record.started_s, *(step.expected_end_s for step in self._steps)])
        if output.total_num_scheduled_tokens:
            record.expected_end_s = begins_s + predicted_s
        self._notes.ran(self.requests[name] for name in output.num_scheduled_tokens)
        self._steps.append(record)
        if record.plan.stoppable and output.total_num_scheduled_tokens:
            step = record.running(begins_s, predicted_s)
            self.monitor.step_started(record.number, step, model)

    # Its output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        record = self._steps.popleft()
        asked = self.monitor.step_ended() if record.plan.stoppable else None
        computed = scheduler_output.num_scheduled_tokens
        self._last_stopped = isinstance(model_runner_output, StoppedOutput)
        if self._last_stopped:
            self._undo(record, computed, model_runner_output, asked)
        else:
            self.tracker.computed(computed, record.ends, self.stats)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        now_s = self.clock()
        for client in outputs.values():
            for one in client.outputs:
                if one.new_token_ids:
                    self.tracker.emitted(one.request_id, len(one.new_token_ids), now_s, self.stats)
        if self._last_stopped:
            self.experience.stopped(now_s)
        else:
            learn(self.experience, record, now_s, self.stats)
        self._gauge()
        self._hand_over(outputs)
        self.tracker.drop_finished(self.requests)
        return outputs

    def _undo(
        self,
        record: StepRecord,
        computed: dict[str, int],
        output: StoppedOutput,
        asked: AskedStop | None,
    ) -> None:
        orphans = roll_back(self, computed, record.before)
        for request_id in orphans:
            request = self.requests[request_id]
            self.running.remove(request)
            request.num_computed_tokens = 0  # nothing of it is worth copying
            self._preempt_request(request, self.clock())
        self.tracker.stopped(computed, record.ends)
        for request_id in computed:
            if request := self.requests.get(request_id):
                self._notes.stopped(request)
        self.stats.count("stopped_steps")
        self.stats.count("stopped_layers", output.layers_done)
        self.stats.count("dropped_tokens", sum(computed.values()))
        if asked is not None:
            self.stats.observe("stop_response_seconds", self.clock() - asked.at_s)
            self.stats.observe("stop_response_layers", output.layers_done - asked.layer)

    def _hand_over(self, outputs: dict[int, Any]) -> None:
        """vLLM collects figures before a step's requests have ended. What came since goes with
        the same outputs: the next step may be hours away."""
        connector = self._our_connector
        if connector is not None and connector is self.connector:
            send_with(outputs, connector.get_kv_connector_stats())
        self._own_stats.reset()

    def _gauge(self) -> None:
        stats, queue = self.stats, self.waiting
        num_online = sum(1 for r in self.running if is_online(r))
        stats.set("running_requests", num_online, "online")
        stats.set("running_requests", len(self.running) - num_online, "offline")
        stats.set("waiting_requests", len(queue.online), "online")
        stats.set("waiting_requests", len(queue.offline), "offline")
        if self.checkpointer is not None:
            self.checkpointer.gauge()
        stats.set("interruptions_per_second", self.experience.traffic.interruption_rate)
        if unstopped := self.monitor.take_unstopped():
            stats.count("unstopped_arrivals", unstopped)
        self._memory.gauge(self.running, self.clock(), stats)

    # Requests and the end

    def add_request(self, request: Any) -> None:
        if request.request_id not in self.requests:
            self.tracker.add(request)
            self._notes.came(request)
            self.stats.count("requests", label="online" if is_online(request) else "offline")
        super().add_request(request)
        self.monitor.taken(request.request_id)

    def forget_history(self) -> None:
        """Start counting anew: what the start-up profile did is nobody's traffic."""
        self.experience.forget_traffic()
        self.tracker = RequestTracker(self.block_size)
        self.stats.reset()
        if self.log_stats:
            self.kv_cache_manager.make_prefix_cache_stats()

    def shutdown(self) -> None:
        super().shutdown()
        self.flag.unlink()
