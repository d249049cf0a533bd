"""What this engine can do: whether its steps can be stopped, and how often to look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conserve.engine.door import current_platform
from conserve.engine.scheduler_view import SchedulerView
from conserve.engine.settings import EngineSettings

CPU_RESPONSE_S = 0.1
GPU_RESPONSE_S = 0.005


def why_not_stoppable(
    scheduler: SchedulerView, settings: EngineSettings, *, has_connector: bool
) -> str:
    """The reason why no step may be stopped between layers, or nothing if steps may be."""
    config = scheduler.vllm_config
    parallel = config.parallel_config
    reasons = (
        (settings.stop == "off", "switched off (stop: off)"),
        (not has_connector, "no ConserveConnector is configured (use `conserve serve`)"),
        (not str(parallel.worker_cls).startswith("conserve."), "the worker class is not ours"),
        (parallel.pipeline_parallel_size > 1, "pipeline stages run different layers"),
        (parallel.nnodes > 1, "the stop flag reaches one host only"),
        (scheduler.has_mamba_layers, "recurrent state is updated in place, layer by layer"),
        (config.model_config.runner_type == "pooling", "a pooling model samples no tokens"),
        (scheduler.is_encoder_decoder, "encoder-decoder models are not covered"),
        (scheduler.num_spec_tokens > 0, "draft models keep state of their own"),
        (
            parallel.data_parallel_size > 1 and config.model_config.is_moe,
            "layers of other replicas wait for those of this one",
        ),
        (parallel.use_ubatching, "two halves of a batch run in two threads"),
        (config.ec_transfer_config is not None, "encoder output from elsewhere is not covered"),
        (config.aux_output_config.enabled, "auxiliary output is recorded step by step"),
    )
    return next((reason for holds, reason in reasons if holds), "")


def passes_safepoints(vllm_config: Any, grants: Mapping[str, int]) -> bool:
    """Whether a step of these grants (request -> tokens) looks at the flag at all: one that
    CUDA replays as a single full graph does not. Says no where a worker might do so."""
    config = vllm_config.compilation_config
    mode, largest = config.cudagraph_mode, config.max_cudagraph_capture_size
    if not mode or not largest or sum(grants.values()) > largest:
        return True
    one_token_each = max(grants.values(), default=0) <= 1
    runs = mode.decode_mode() if one_token_each else mode.mixed_mode()
    return bool(runs.name != "FULL")


def layers_between_safepoints(
    vllm_config: Any, settings: EngineSettings, predicted_s: float
) -> int:
    """Layers from one look at the flag to the next, so that a stop answers in time: within two
    such stretches, the one in which the flag goes up and the one that CUDA has queued by then
    (`safepoints.RUN_AHEAD`)."""
    default_s = CPU_RESPONSE_S if current_platform.is_cpu() else GPU_RESPONSE_S
    response_s = settings.stop_response_s or default_s
    num_layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    layer_s = predicted_s / max(1, num_layers)
    return max(1, min(num_layers // 4, int(response_s / 2 / layer_s))) if layer_s > 0 else 1
