"""Workers whose forward may be stopped at a layer boundary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from conserve.engine.connector import find_ours
from conserve.engine.door import (
    CPUWorker,
    GPUWorker,
    get_kv_transfer_group,
    has_kv_transfer_group,
)
from conserve.engine.safepoints import StopStep
from conserve.engine.stopped import StoppedOutput
from conserve.engine.unwind import Unwinding, UnwindV1, UnwindV2


class StoppableWorker:
    """Mixin over a vLLM worker: a stopped step ends without sampling, in a `StoppedOutput`."""

    model_runner: Any
    vllm_config: Any
    _unwinding: Unwinding | None = None

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        result = super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        self._step_request_ids: list[str] = []
        if has_kv_transfer_group() and find_ours(get_kv_transfer_group()) is not None:
            if self.vllm_config.use_v2_model_runner:
                self._unwinding = UnwindV2(self.model_runner)
            else:
                self._unwinding = UnwindV1(self.model_runner, self.vllm_config.model_config)
        return result

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._unwinding is None:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        self._unwinding.layers_done = None
        self._step_request_ids = list(scheduler_output.num_scheduled_tokens)
        try:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        except StopStep as stop:
            self._unwinding.caught(stop, scheduler_output)
            return None

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self._unwinding is None or self._unwinding.layers_done is None:
            return super().sample_tokens(grammar_output)  # type: ignore[misc]
        layers_done, self._unwinding.layers_done = self._unwinding.layers_done, None
        connector_output = self._unwinding.finish()
        return StoppedOutput.of(self._step_request_ids, layers_done, connector_output)


class ConserveCPUWorker(StoppableWorker, CPUWorker):  # type: ignore[misc]
    """`--worker-cls` on CPU platforms."""

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.vllm_config.use_v2_model_runner:
            return super().sample_tokens(grammar_output)
        with self._nothing_drawn_for_parts_of_prompts():
            return super().sample_tokens(grammar_output)

    @contextmanager
    def _nothing_drawn_for_parts_of_prompts(self) -> Iterator[None]:
        """vLLM samples for every request of a step, and takes the draw back where a part of a
        prompt was computed, by rewinding the request's generator. A CPU generator cannot be
        rewound (it raises, and the engine dies), so such requests draw without theirs."""
        runner = self.model_runner
        generators: dict[int, torch.Generator] = runner.input_batch.generators
        unfinished = [row for row in generators if runner.discard_request_mask.np[row]]
        spared = {row: generators.pop(row) for row in unfinished}
        try:
            yield
        finally:
            generators.update(spared)


class ConserveGPUWorker(StoppableWorker, GPUWorker):  # type: ignore[misc]
    """`--worker-cls` on CUDA platforms."""
