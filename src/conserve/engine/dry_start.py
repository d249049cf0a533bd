"""The scheduler of a model that is not loaded: its layers are made without weights, and say what
they keep."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from conserve.engine import door
from conserve.engine.scheduler import ConserveScheduler

NUM_BLOCKS = 1024
"""Any number that a scheduler can begin with."""


def scheduler_without_weights(vllm_config: Any) -> Any:
    """A ConserveScheduler as `conserve serve` would have it, but for its memory. For a process of
    its own: it takes part in a group of one rank, and leaves vLLM's state behind."""
    groups = door.get_kv_cache_groups(vllm_config, _specs(vllm_config))
    cache = door.KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)
    vllm_config.cache_config.num_gpu_blocks = NUM_BLOCKS
    block_size, hash_tokens = door.resolve_kv_cache_block_sizes(cache, vllm_config)
    cache.hash_block_size = hash_tokens
    return ConserveScheduler(
        vllm_config=vllm_config,
        kv_cache_config=cache,
        structured_output_manager=door.StructuredOutputManager(vllm_config),
        block_size=block_size,
        hash_block_size=hash_tokens,
        log_stats=False,
    )


def _specs(vllm_config: Any) -> dict[str, Any]:
    """What each layer keeps, by the layer's name."""
    with _one_rank(vllm_config):
        door.initialize_model(vllm_config)
    layers = door.get_layers_from_vllm_config(vllm_config, door.AttentionLayerBase)
    specs = {name: layer.get_kv_cache_spec(vllm_config) for name, layer in layers.items()}
    return {name: spec for name, spec in specs.items() if spec is not None}


@contextmanager
def _one_rank(vllm_config: Any) -> Iterator[None]:
    """Where a model can be made: a group of one rank, the model's data type, and no memory."""
    import torch

    given = torch.get_default_dtype()
    with tempfile.TemporaryDirectory() as folder, door.set_current_vllm_config(vllm_config):
        door.init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, "gloo")
        door.ensure_model_parallel_initialized(1, 1)
        torch.set_default_dtype(vllm_config.model_config.dtype)
        try:
            with torch.device("meta"):
                yield
        finally:
            torch.set_default_dtype(given)
