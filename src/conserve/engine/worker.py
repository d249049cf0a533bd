"""Workers whose forward may be stopped at a layer boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from conserve.engine.connector import ConserveConnector, find_ours
from conserve.engine.door import (
    CPUWorker,
    GPUWorker,
    get_kv_transfer_group,
    has_kv_transfer_group,
)
from conserve.engine.flag import StopFlag, flag_name
from conserve.engine.safepoints import Safepoints, StopStep
from conserve.engine.settings import EngineSettings
from conserve.engine.stopped import StoppedOutput


class StoppableWorker:
    """Mixin over a vLLM worker with Model Runner V1.

    The forward is caught right where the runner calls the model, so that everything around
    it (connectors, encoder state, the runner's own bookkeeping) goes its usual way; only the
    sampling of a stopped step is left out.
    """

    model_runner: Any
    vllm_config: Any
    rank: int

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        result = super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        self._layers_done: int | None = None
        self._step_request_ids: list[str] = []
        connector = _our_connector()
        if connector is not None and hasattr(self.model_runner, "_model_forward"):
            on_cuda = torch.cuda.is_available() and self.model_runner.device.type == "cuda"
            make_event = torch.cuda.Event if on_cuda else None
            settings = EngineSettings.of(self.vllm_config.additional_config)
            flag = StopFlag(flag_name(self.vllm_config), rank_timeout_s=settings.rank_timeout_s)
            connector.safepoints = Safepoints(flag, self.rank, make_event)
            forward = self.model_runner._model_forward
            self.model_runner._model_forward = self._stoppable(forward)
        return result

    def _stoppable(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except StopStep as stop:
                self._layers_done = stop.layers_done
                return self._no_hidden_states(*args, **kwargs)

        return run

    def _no_hidden_states(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Zeros in the shape of the hidden states, [tokens, hidden size]; never sampled from."""
        positions = kwargs.get("positions")
        if positions is None:
            positions = args[1]
        config = self.vllm_config.model_config
        shape = (positions.shape[-1], config.get_hidden_size())
        return torch.zeros(shape, dtype=config.dtype, device=positions.device)

    def execute_model(self, scheduler_output: Any) -> Any:
        self._layers_done = None
        self._step_request_ids = list(scheduler_output.num_scheduled_tokens)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self._layers_done is None:
            return super().sample_tokens(grammar_output)  # type: ignore[misc]
        runner = self.model_runner
        connector_output, runner.kv_connector_output = runner.kv_connector_output, None
        runner.execute_model_state = None
        layers_done, self._layers_done = self._layers_done, None
        return StoppedOutput.of(self._step_request_ids, layers_done, connector_output)


def _our_connector() -> ConserveConnector | None:
    return find_ours(get_kv_transfer_group()) if has_kv_transfer_group() else None


class ConserveCPUWorker(StoppableWorker, CPUWorker):  # type: ignore[misc]
    """`--worker-cls` on CPU platforms."""


class ConserveGPUWorker(StoppableWorker, GPUWorker):  # type: ignore[misc]
    """`--worker-cls` on CUDA platforms."""
