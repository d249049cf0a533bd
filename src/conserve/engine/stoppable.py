"""A worker's steps, which may be stopped at a layer boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conserve.engine.connector import find_ours
from conserve.engine.door import get_kv_transfer_group, has_kv_transfer_group
from conserve.engine.safepoints import StopStep
from conserve.engine.step_times import StepClock
from conserve.engine.stopped import StoppedOutput
from conserve.engine.unwind import Unwinding, UnwindV1, UnwindV2


class StoppableSteps:
    """What our workers put around the two calls of vLLM's that make a step: a stopped one ends
    without sampling, in a `StoppedOutput`, and each says when the device was done with it.
    Without `unwinding` none is stopped."""

    def __init__(self, unwinding: Unwinding | None = None, clock: StepClock | None = None) -> None:
        self.unwinding = unwinding
        self._clock = clock or StepClock()
        self._request_ids: list[str] = []

    @classmethod
    def of(cls, worker: Any) -> StoppableSteps:
        """Once vLLM has made the worker's connector; without ours there are no safepoints."""
        ours = find_ours(get_kv_transfer_group()) if has_kv_transfer_group() else None
        if ours is None:
            return cls()
        clock = ours.worker_side.clock
        if worker.vllm_config.use_v2_model_runner:
            return cls(UnwindV2(worker.model_runner), clock)
        return cls(UnwindV1(worker.model_runner, worker.vllm_config.model_config), clock)

    def execute(self, execute_model: Callable[[Any], Any], scheduler_output: Any) -> Any:
        """Call vLLM's `execute_model`; None after a stop, as before sampling."""
        if self.unwinding is None:
            return execute_model(scheduler_output)
        self.unwinding.layers_done = None
        self._request_ids = list(scheduler_output.num_scheduled_tokens)
        try:
            return execute_model(scheduler_output)
        except StopStep as stop:
            self.unwinding.caught(stop, scheduler_output)
            return None

    def sample(self, sample_tokens: Callable[[Any], Any], grammar_output: Any) -> Any:
        """Call vLLM's `sample_tokens`, or end the step that was stopped."""
        if self.unwinding is None:
            return sample_tokens(grammar_output)
        if self.unwinding.layers_done is None:
            output = sample_tokens(grammar_output)
        else:
            output = self._stopped(self.unwinding, self.unwinding.layers_done)
        return None if output is None else self._clock.timed(output)

    def _stopped(self, unwinding: Unwinding, layers_done: int) -> StoppedOutput:
        unwinding.layers_done = None
        return StoppedOutput.of(self._request_ids, layers_done, unwinding.finish())
