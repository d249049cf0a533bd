"""vLLM's scheduler under our policy: what is overridden of it, and which part answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from conserve.core.learning import Experience
from conserve.engine import abilities
from conserve.engine.admission import Admission
from conserve.engine.alarm import Alarm
from conserve.engine.arrival import arrived_s
from conserve.engine.canvases import fitting
from conserve.engine.capabilities import refuse_several_schedules, runs_workers_inside
from conserve.engine.checkpoint.host_view import HostView
from conserve.engine.checkpoint.keeping import CheckpointKeeper
from conserve.engine.connector import scheduler_side
from conserve.engine.door import AsyncScheduler
from conserve.engine.driver import Driver
from conserve.engine.kv_groups import kv_groups_of
from conserve.engine.online_load import count_online_only
from conserve.engine.orphan import end_with_parent
from conserve.engine.pausing import preempt_all
from conserve.engine.promises import Promises
from conserve.engine.queue import ClassQueue
from conserve.engine.remembering import Remembering
from conserve.engine.resumed import name_no_blocks
from conserve.engine.retention import Retention
from conserve.engine.settings import EngineSettings
from conserve.engine.snapshots import Snapshots
from conserve.engine.speculation import Drafting
from conserve.engine.steps import GENERIC_ERROR, GENERIC_MODEL
from conserve.engine.stopper import Stopper
from conserve.engine.tracing import TraceNotes
from conserve.engine.tracker import RequestTracker


class ConserveScheduler(AsyncScheduler):  # type: ignore[misc]
    """Online requests first, offline requests in the slack. See docs/design/engine.md."""

    clock: Callable[[], float] = staticmethod(time.monotonic)
    """Seconds. Durations are measured with it alone: the wall clock may be set at any moment."""
    wall_clock: Callable[[], float] = staticmethod(time.time)
    """Seconds. vLLM's arrival times are of this one."""
    make_alarm: Callable[..., Alarm] = Alarm
    """Made with `clock` and what it is to call."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> ConserveScheduler:
        return super().__new__(fitting(cls, vllm_config))  # type: ignore[no-any-return]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # From 0.33 on vLLM may keep prompts out of steps (--prefill-schedule-interval) till so many
        # others have run: none do where the policy has given the step to a prompt alone.
        self.local_prefill_interval = 1
        config, clock = self.vllm_config, self.clock
        refuse_several_schedules(config)
        self.settings = settings = EngineSettings.of(config.additional_config)
        self.promises = Promises(settings)
        self.waiting = ClassQueue(self.promises.wait_s)
        self.kv_holding_waiting = ClassQueue(self.promises.wait_s)
        side, groups = scheduler_side(self.connector), kv_groups_of(self)
        self.stats, self.checkpointer = side.stats, side.checkpointer
        self.drafting = Drafting.of(self)
        self.tracker = RequestTracker(groups or self.block_size, self.promises, self.drafting)
        self.experience = Experience(GENERIC_MODEL, GENERIC_ERROR)
        self.keeper = CheckpointKeeper(self, side.checkpointer, self.tracker, self.experience)
        self.stopper = Stopper(self, settings, self.promises, self.stats, clock, self.make_alarm)
        self.monitor = self.stopper.monitor
        """Where the plugin reports arrivals."""
        self.admission = Admission(self)
        self.retention = Retention(self, class_aware=settings.policy.class_aware)
        self.remembering = Remembering(
            self, settings.policy, self.retention, self.experience, side.stats
        )
        self.snapshots = Snapshots(
            self,
            self.promises,
            self.tracker,
            self.experience,
            HostView(side.checkpointer),
            self.remembering,
            groups,
            self.drafting,
        )
        self.driver = Driver(
            scheduler=self,
            settings=settings.effective_policy,
            clock=clock,
            stats=self.stats,
            tracker=self.tracker,
            experience=self.experience,
            snapshots=self.snapshots,
            remembering=self.remembering,
            keeper=self.keeper,
            promises=self.promises,
            stopper=self.stopper,
            notes=TraceNotes(config.observability_config.otlp_traces_endpoint is not None),
            dispatch_blocks=runs_workers_inside(config),
        )
        abilities.say(self)
        end_with_parent()

    # One step

    def schedule(self, throttle_prefills: bool = False) -> Any:
        record = self.driver.begin()
        with self.admission.only(record.plan):
            output = super().schedule(throttle_prefills)
        name_no_blocks(output, len(self.kv_cache_config.kv_cache_groups))
        self.driver.scheduled(record, output)
        return output

    def _reserve_prefill_lookahead(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """vLLM asks how many tokens a request may have, right before it allocates blocks."""
        allowed = self.admission.num_allowed(request, num_computed_tokens, num_new_tokens)
        return int(super()._reserve_prefill_lookahead(request, num_computed_tokens, allowed))

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> Any:
        """vLLM asks before it asks for the grant, and notes what it finds: of media that the grant
        does not reach, the encoder would compute, and keep, all that its budget allows."""
        allowed = self.admission.num_allowed(request, num_computed_tokens, num_new_tokens)
        return super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, allowed, encoder_compute_budget, shift_computed_tokens
        )

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        record = self.driver.computed(scheduler_output, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self.driver.delivered(record, outputs)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """What becomes vLLM's own gauges. `get_request_counts` stays: vLLM decides by it whether
        there is work at all."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self.settings.router_metrics == "online":
            count_online_only(stats, self, self.driver.gauges.kv_online_usage)
        return stats

    # Where steps do not overlap, vLLM has its plain scheduler: no request is in a step before its
    # last token is known, which several steps of a pipeline would otherwise compute without it.

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        self._vllms._update_after_schedule(scheduler_output)

    def _update_request_with_output(
        self, request: Any, new_token_ids: list[int], is_stale: bool = False
    ) -> Any:
        return self._vllms._update_request_with_output(request, new_token_ids, is_stale)

    @property
    def _vllms(self) -> Any:
        overlaps = self.scheduler_config.async_scheduling
        return super() if overlaps else super(AsyncScheduler, self)

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Without asynchronous scheduling vLLM asks the workers for their drafts after each step.
        After a stopped one they have those of the step before, and their requests are back where
        they had them, or where they are of no use."""
        if not self.driver.last_stopped:
            super().update_draft_token_ids(draft_token_ids)

    # Requests

    def arrived_s(self, request: Any) -> float:
        """When it arrived, by `clock`."""
        return arrived_s(request, self.clock(), self.wall_clock())

    def add_request(self, request: Any) -> None:
        self.driver.came(request, self.arrived_s(request))
        super().add_request(request)
        self.monitor.taken(request.request_id)

    def _preempt_request(
        self, request: Any, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        """vLLM frees the blocks of a running request, for us or for itself. Where a connector hands
        KV on that the last token in flight would come without, that token is computed anew."""
        self.keeper.leaves(request)
        drops = drop_stale_output or self.requires_kv_delivery
        super()._preempt_request(request, timestamp, drops)

    def _free_request_blocks(self, request: Any) -> None:
        """vLLM calls this wherever a request lets go of its blocks."""
        self.retention.lets_go(request)
        self.remembering.lets_go(request)
        super()._free_request_blocks(request)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        self.keeper.before_finish(request_ids)
        return super().finish_requests(request_ids, finished_status)

    # The end

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """vLLM calls this when KV is worth nothing any more (the weights have changed)."""
        self.keeper.before_reset()
        if reset_running_requests:
            preempt_all(self, self.clock())
        try:
            return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))
        finally:
            self.retention.forget()
            self.remembering.forget()
            self.checkpointer.forget_all()

    def shutdown(self) -> None:
        super().shutdown()
        self.stopper.close()
