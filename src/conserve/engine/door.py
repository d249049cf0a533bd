"""Every name of vLLM that the engine room uses, and where it lives in vLLM 0.32 and 0.33.

An upgrade of vLLM is a diff of this table; `make vllm-next` says in lines which doors have
changed. They stay shut to a vLLM that is neither tried nor allowed (`versions.py`). Names are
imported when they are first asked for, since workers, scheduler and API process each may load only
their own part of vLLM.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

from conserve.engine import versions

DOORS = {
    "AsyncMPClient": "vllm.v1.engine.core_client",
    "AsyncModelRunnerOutput": "vllm.v1.outputs",
    "AsyncScheduler": "vllm.v1.core.sched.async_scheduler",
    "AttentionLayerBase": "vllm.model_executor.layers.attention_layer_base",
    "ChunkedLocalAttentionSpec": "vllm.v1.kv_cache_interface",
    "CPUWorker": "vllm.v1.worker.cpu_worker",
    "DiffusionAsyncScheduler": "vllm.v1.core.sched.diffusion_scheduler",
    "EngineCore": "vllm.v1.engine.core",
    "FullAttentionSpec": "vllm.v1.kv_cache_interface",
    "GPUWorker": "vllm.v1.worker.gpu_worker:Worker",
    "KVCacheConfig": "vllm.v1.kv_cache_interface",
    "KVConnectorBase_V1": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "KVConnectorFactory": "vllm.distributed.kv_transfer.kv_connector.factory",
    "KVConnectorMetadata": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "KVConnectorPromMetrics": "vllm.distributed.kv_transfer.kv_connector.v1.metrics",
    "KVConnectorRole": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "KVConnectorWorkerMetadata": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "KVConnectorStats": "vllm.distributed.kv_transfer.kv_connector.v1.metrics",
    "MLAAttentionSpec": "vllm.v1.kv_cache_interface",
    "MambaSpec": "vllm.v1.kv_cache_interface",
    "ModelRunnerOutput": "vllm.v1.outputs",
    "PauseState": "vllm.v1.core.sched.interface",
    "PoolingParams": "vllm",
    "Request": "vllm.v1.request",
    "RequestQueue": "vllm.v1.core.sched.request_queue",
    "RequestStatus": "vllm.v1.request",
    "SamplingParams": "vllm",
    "SlidingWindowSpec": "vllm.v1.kv_cache_interface",
    "StructuredOutputManager": "vllm.v1.structured_output",
    "SupportsHMA": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "VllmConfig": "vllm.config",
    "VLLM_VERSION": "vllm.version:__version__",
    "cpu_attn_reshape_and_cache": "vllm._custom_ops",
    "current_platform": "vllm.platforms",
    "engine_core_module": "vllm.v1.engine.core:",
    "ensure_model_parallel_initialized": "vllm.distributed",
    "get_block_hash": "vllm.v1.core.kv_cache_utils",
    "get_cgroup_memory_limit": "vllm.utils.cpu_resource_utils",
    "get_cgroup_memory_usage": "vllm.utils.cpu_resource_utils",
    "get_kv_cache_groups": "vllm.v1.core.kv_cache_planning|vllm.v1.core.kv_cache_utils",
    "get_kv_transfer_group": "vllm.distributed.kv_transfer",
    "get_layers_from_vllm_config": "vllm.config.vllm",
    "has_kv_transfer_group": "vllm.distributed.kv_transfer",
    "group_kernel_blocks": "vllm.v1.kv_cache_interface",
    "init_distributed_environment": "vllm.distributed",
    "init_logger": "vllm.logger",
    "initialize_model": "vllm.model_executor.model_loader.utils",
    "output_processor_module": "vllm.v1.engine.output_processor:",
    "resolve_kv_cache_block_sizes": "vllm.v1.core.kv_cache_utils",
    "set_current_vllm_config": "vllm.config",
}
"""Our name -> module, module:name where vLLM's name differs, or module: for itself. Several, with a
bar between, where vLLM has moved it: the newest first."""

METHODS = {
    "AsyncMPClient": ("call_utility_async",),
    "AsyncModelRunnerOutput": ("get_output",),
    "AsyncScheduler": (
        "schedule", "update_from_output", "update_draft_token_ids", "make_stats", "add_request",
        "finish_requests", "reset_prefix_cache", "shutdown", "_reserve_prefill_lookahead",
        "_try_schedule_encoder_inputs", "_preempt_request", "_update_after_schedule",
        "_update_request_with_output",
        "_handle_blocked_waiting_request", "_free_request_blocks", "_set_kv_fetch_stage",
        "_request_blocks_can_be_freed",
    ),
    "CPUWorker": (
        "initialize_from_config", "execute_model", "sample_tokens", "synchronize_device",
    ),
    "EngineCore": (
        "__init__", "preprocess_add_request", "add_request",
        "_initialize_effective_attention_block_size",
    ),
    "GPUWorker": (
        "determine_available_memory", "get_kv_cache_spec", "initialize_from_config",
        "compile_or_warm_up_model", "execute_model", "sample_tokens", "synchronize_device",
    ),
    "KVConnectorBase_V1": (
        "bind_connector_metadata", "clear_connector_metadata", "wait_for_layer_load",
        "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta",
        "register_kv_caches", "handle_preemptions", "build_connector_worker_meta",
        "update_connector_output", "shutdown",
        "get_kv_connector_stats", "build_kv_connector_stats", "requires_kv_delivery",
        "reset_cache",
    ),
    "KVConnectorFactory": ("register_connector",),
    "SupportsHMA": ("request_finished_all_groups",),
    "VllmConfig": ("compute_hash",),
}  # fmt: skip
"""Methods that we call, override or wrap."""


def __getattr__(name: str) -> Any:
    if name not in DOORS:
        raise AttributeError(f"no door to vLLM's {name}")
    versions.check()
    *newer, oldest = DOORS[name].split("|")
    for place in newer:
        with suppress(ImportError, AttributeError):
            return _open(name, place)
    return _open(name, oldest)


def _open(name: str, place: str) -> Any:
    path, colon, inner = place.partition(":")
    module = import_module(path)
    value = module if colon and not inner else getattr(module, inner or name)
    globals()[name] = value
    return value
