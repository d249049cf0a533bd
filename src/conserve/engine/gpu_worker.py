"""`--worker-cls` on CUDA platforms."""

from __future__ import annotations

from typing import Any

from conserve.engine import phases
from conserve.engine.connector import nothing_pinned, settle_copies
from conserve.engine.door import GPUWorker, init_logger
from conserve.engine.kept_states import kept_bytes
from conserve.engine.stoppable import StoppableSteps

logger = init_logger("vllm.conserve")


class ConserveGPUWorker(GPUWorker):  # type: ignore[misc]
    """vLLM's, whose steps may be stopped."""

    _steps = StoppableSteps()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        phases.begin(phases.LOADING)
        super().load_model(*args, **kwargs)

    def determine_available_memory(self) -> int:
        """What is left for KV beside the copies of recurrent state."""
        phases.begin(phases.WARMING_UP)
        kept = kept_bytes(self.vllm_config, self.get_kv_cache_spec())
        if kept:
            logger.info(
                "ConServe: %.2f GiB of the device's memory are for copies of recurrent state, so "
                "that steps can be stopped (conserve.stop: off takes none)",
                kept / 2**30,
            )
        return int(super().determine_available_memory()) - kept

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        result = super().initialize_from_config(*args, **kwargs)
        self._steps = StoppableSteps.of(self)
        return result

    def compile_or_warm_up_model(self) -> Any:
        """CUDA graphs are captured in it. The driver may refuse to pin memory then, and take what
        is being captured for spoilt."""
        with nothing_pinned():
            return super().compile_or_warm_up_model()

    def synchronize_device(self) -> None:
        """Copies are queued by a thread: the device is not idle before they are over."""
        settle_copies()
        super().synchronize_device()

    def execute_model(self, scheduler_output: Any) -> Any:
        return self._steps.execute(super().execute_model, scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._steps.sample(super().sample_tokens, grammar_output)
