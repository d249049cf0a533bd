"""A worker's steps, which may be stopped at a layer boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conserve.engine.connector import find_ours
from conserve.engine.door import get_kv_transfer_group, has_kv_transfer_group
from conserve.engine.safepoints import Safepoints, StopStep
from conserve.engine.step_times import StepClock
from conserve.engine.stopped import StoppedOutput
from conserve.engine.unwind import Unwinding, UnwindV1, UnwindV2


class StoppableSteps:
    """What our workers put around the two calls of vLLM's that make a step: its copies begin before
    it, a stopped one ends without sampling, in a `StoppedOutput`, and each says when the device was
    done with it. A pooling model's step ends with the first call. Without `unwinding` none is
    stopped."""

    def __init__(
        self,
        unwinding: Unwinding | None = None,
        clock: StepClock | None = None,
        *,
        safepoints: Safepoints | None = None,
        is_pooling: bool = False,
        begin_copies: Callable[[Any], None] | None = None,
    ) -> None:
        self.unwinding = unwinding
        self._begin_copies = begin_copies
        self._safepoints = safepoints
        self._clock = clock or StepClock()
        self._is_pooling = is_pooling
        self._request_ids: list[str] = []

    @classmethod
    def of(cls, worker: Any) -> StoppableSteps:
        """Once vLLM has made the worker's connector; without ours there are no safepoints."""
        ours = find_ours(get_kv_transfer_group()) if has_kv_transfer_group() else None
        if ours is None:
            return cls()
        side, config = ours.worker_side, worker.vllm_config
        runner, model = worker.model_runner, config.model_config
        unwinding: Unwinding
        unwinding = UnwindV2(runner) if config.use_v2_model_runner else UnwindV1(runner, model)
        is_pooling = model.runner_type == "pooling"
        return cls(
            unwinding,
            side.clock,
            safepoints=side.safepoints,
            is_pooling=is_pooling,
            begin_copies=ours.begin_copies,
        )

    def execute(self, execute_model: Callable[[Any], Any], scheduler_output: Any) -> Any:
        """Call vLLM's `execute_model`, behind the step's copies; None after a stop, as before
        sampling."""
        if self._begin_copies is not None:
            self._begin_copies(scheduler_output.kv_connector_metadata)
        if self.unwinding is None:
            return execute_model(scheduler_output)
        self.unwinding.layers_done = None
        self._request_ids = list(scheduler_output.num_scheduled_tokens)
        try:
            output = execute_model(scheduler_output)
        except StopStep as stop:
            self.unwinding.caught(stop, scheduler_output)
            output = None
        if self._safepoints is not None:
            # A draft model's layers come while sampling: those are not left out.
            self._safepoints.end()
        ends = self._is_pooling and self._request_ids
        return self._ended(self.unwinding, output) if ends else output

    def sample(self, sample_tokens: Callable[[Any], Any], grammar_output: Any) -> Any:
        """Call vLLM's `sample_tokens`, or end the step that was stopped."""
        if self.unwinding is None:
            return sample_tokens(grammar_output)
        is_stopped = self.unwinding.layers_done is not None
        output = None if is_stopped else sample_tokens(grammar_output)
        return self._ended(self.unwinding, output)

    def _ended(self, unwinding: Unwinding, output: Any) -> Any:
        """The step's output with its times: vLLM's, or ours of a step that was stopped."""
        if unwinding.layers_done is not None:
            layers_done, unwinding.layers_done = unwinding.layers_done, None
            output = StoppedOutput.of(self._request_ids, layers_done, unwinding.finish())
        return None if output is None else self._clock.timed(output)
