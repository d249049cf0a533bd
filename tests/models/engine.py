"""A real engine with our scheduler on a small model, in the process that calls."""

from __future__ import annotations

from typing import Any

from tests.models.family import MAX_MODEL_LEN, Family

STEP_TOKENS = 256


def make_engine(family: Family, model: str) -> Any:
    """vLLM's engine on the model in this folder, with everything of ours switched on."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from conserve.core.settings import PolicySettings
    from conserve.engine import plugin
    from conserve.engine.launch import vllm_arguments
    from conserve.engine.settings import EngineSettings

    plugin.register()
    settings = EngineSettings(
        profile_seconds=0 if family.task == "generate" else 0.5,
        stop_response_s=1e-6,
        checkpoint_bytes=64 << 20,
        checkpoint_verify=True,
        policy=PolicySettings(stop_gap_share=1.0),
    )
    told = {
        "model": model,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 6,
        "max_num_batched_tokens": STEP_TOKENS,
        "num_gpu_blocks_override": family.num_blocks,
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": 32,
        "distributed_executor_backend": "uni",
        "speculative_config": family.speculation(model) if family.speculation else None,
        **vllm_arguments(settings),
        **family.options,
    }
    config = EngineArgs(**told).create_engine_config()
    return LLMEngine.from_vllm_config(config, disable_log_stats=True)
