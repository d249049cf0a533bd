"""`--worker-cls` on CPU platforms. Not to be imported where a GPU worker lives: with its base
vLLM puts stand-ins in the place of CUDA's events and streams, for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from conserve.engine import phases
from conserve.engine.connector import settle_copies
from conserve.engine.door import CPUWorker
from conserve.engine.stoppable import StoppableSteps


class ConserveCPUWorker(CPUWorker):  # type: ignore[misc]
    """vLLM's, whose steps may be stopped."""

    _steps = StoppableSteps()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        phases.begin(phases.LOADING)
        super().load_model(*args, **kwargs)

    def determine_available_memory(self) -> int:
        phases.begin(phases.WARMING_UP)
        return int(super().determine_available_memory())

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        result = super().initialize_from_config(*args, **kwargs)
        self._steps = StoppableSteps.of(self)
        return result

    def synchronize_device(self) -> None:
        """Copies are queued by a thread: the device is not idle before they are over."""
        settle_copies()
        super().synchronize_device()

    def execute_model(self, scheduler_output: Any) -> Any:
        return self._steps.execute(super().execute_model, scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.vllm_config.use_v2_model_runner:
            return self._steps.sample(super().sample_tokens, grammar_output)
        with self._nothing_drawn_for_parts_of_prompts():
            return self._steps.sample(super().sample_tokens, grammar_output)

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
