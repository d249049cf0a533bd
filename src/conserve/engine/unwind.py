"""Where a stopped forward is caught in each of vLLM's two model runners, and what is left of
its step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from conserve.engine.safepoints import StopStep


class Unwinding(Protocol):
    """One runner's way from the stop to the end of the step."""

    layers_done: int | None
    """Layers done by the stopped forward; None if this step was not stopped."""

    def caught(self, stop: StopStep, scheduler_output: Any) -> None:
        """The stop has left the runner's `execute_model`."""

    def finish(self) -> Any:
        """End the step without sampling; the connectors' output."""


class UnwindV1:
    """Model Runner V1 ends the connectors' step inside `execute_model`, so the stop is caught
    right where the model is called and everything around it goes its usual way."""

    def __init__(self, runner: Any, model_config: Any) -> None:
        self.layers_done: int | None = None
        self._runner, self._config = runner, model_config
        runner._model_forward = self._stoppable(runner._model_forward)
        runner._pool = self._pooling(runner._pool)

    def _stoppable(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except StopStep as stop:
                self.layers_done = stop.layers_done
                return self._no_hidden_states(*args, **kwargs)

        return run

    def _pooling(self, pool: Callable[..., Any]) -> Callable[..., Any]:
        """Nothing is pooled of a stopped step: what pooling keeps of a prompt's parts stays as it
        was."""

        def run(
            hidden_states: torch.Tensor, num_tokens: int, tokens: Any, connector_output: Any
        ) -> Any:
            if self.layers_done is None:
                return pool(hidden_states, num_tokens, tokens, connector_output)
            self._runner.kv_connector_output = connector_output
            return None

        return run

    def _no_hidden_states(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros in the shape of the hidden states, [tokens, hidden size]; never sampled from. With
        none of the layers' between, where a draft model reads those (EAGLE 3)."""
        positions = kwargs.get("positions")
        if positions is None:
            positions = args[1]
        shape = (positions.shape[-1], self._config.get_hidden_size())
        zeros = torch.zeros(shape, dtype=self._config.dtype, device=positions.device)
        return (zeros, []) if self._runner.use_aux_hidden_state_outputs else zeros

    def caught(self, stop: StopStep, scheduler_output: Any) -> None:
        raise stop  # somebody else's: ours is caught inside

    def finish(self) -> Any:
        runner = self._runner
        if runner.speculative_config is not None:
            # Such a step of the connectors ends behind the drafts.
            runner.finalize_kv_connector()
        output, runner.kv_connector_output = runner.kv_connector_output, None
        runner.execute_model_state = None
        return output


class UnwindV2:
    """Model Runner V2 ends the connectors' step in `sample_tokens`, and advances a request's
    state on the device nowhere else, so the stop may leave `execute_model`."""

    def __init__(self, runner: Any) -> None:
        self.layers_done: int | None = None
        self._runner = runner
        self._finished_req_ids: set[str] = set()

    def caught(self, stop: StopStep, scheduler_output: Any) -> None:
        self.layers_done = stop.layers_done
        self._finished_req_ids = scheduler_output.finished_req_ids
        self._runner.kv_connector.finish_forward()

    def finish(self) -> Any:
        return self._runner.kv_connector.post_forward(self._finished_req_ids)
