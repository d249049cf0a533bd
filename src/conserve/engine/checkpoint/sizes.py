"""How large the host pool is, and why an engine may have none."""

from __future__ import annotations

from typing import Any

from conserve.engine.checkpoint.bandwidth import Bandwidth
from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.pool import HostPool
from conserve.engine.door import (
    FullAttentionSpec,
    init_logger,
)
from conserve.engine.host_memory import available_bytes
from conserve.engine.settings import EngineSettings

logger = init_logger("vllm.conserve")

DEFAULT_SHARE = 0.25
"""Of the free memory of the host, by default."""
DEFAULT_DEVICES = 4
"""At most this many times the KV cache itself, by default."""


def make_checkpointer(
    scheduler: Any, settings: EngineSettings, *, has_connector: bool
) -> Checkpointer | None:
    """The scheduler's half of checkpoints, or None with a log line that says why not."""
    reason = why_no_checkpoints(scheduler, settings, has_connector=has_connector)
    if not reason:
        slot_bytes = slot_bytes_of(scheduler.kv_cache_config)
        num_ranks = scheduler.vllm_config.parallel_config.world_size
        num_blocks = scheduler.kv_cache_config.num_blocks
        pool_bytes = settings.checkpoint_bytes or default_bytes(num_blocks * slot_bytes * num_ranks)
        num_slots = pool_bytes // (slot_bytes * num_ranks)
        if num_slots:
            return _make(scheduler, settings, slot_bytes, num_ranks, num_slots)
        reason = f"checkpoint_bytes ({pool_bytes}) holds not one block of {slot_bytes} bytes"
    logger.info("ConServe: no checkpoints, displaced requests recompute: %s", reason)
    return None


def _make(
    scheduler: Any, settings: EngineSettings, slot_bytes: int, num_ranks: int, num_slots: int
) -> Checkpointer:
    block_bytes = slot_bytes * num_ranks
    num_disk_slots = settings.checkpoint_dir_bytes // block_bytes if settings.checkpoint_dir else 0
    logger.info(
        "ConServe: checkpoints (%s) in %.2f GiB of host memory, %d tokens%s",
        settings.checkpoint,
        num_slots * block_bytes / 2**30,
        num_slots * scheduler.block_size,
        f", and {num_disk_slots * scheduler.block_size} on disk" if num_disk_slots else "",
    )
    return Checkpointer(
        HostPool(num_slots, scheduler.block_size, num_disk_slots),
        Bandwidth(slot_bytes / scheduler.block_size, settings.checkpoint_bytes_per_s),
        num_ranks=num_ranks,
        incremental=settings.checkpoint == "incremental",
    )


def why_no_checkpoints(scheduler: Any, settings: EngineSettings, *, has_connector: bool) -> str:
    """The reason why displaced requests compute again, or nothing if they may be restored."""
    groups = scheduler.kv_cache_config.kv_cache_groups
    parallel = scheduler.vllm_config.parallel_config
    reasons = (
        (settings.checkpoint == "off", "switched off (checkpoint: off)"),
        (not has_connector, "no ConserveConnector is configured (use `conserve serve`)"),
        (scheduler.has_mamba_layers, "recurrent state is no plain KV cache"),
        (len(groups) != 1, "layers in several KV cache groups are not covered"),
        (
            any(not _is_plain(group.kv_cache_spec) for group in groups),
            "layers without full attention (sliding windows, say) are not covered",
        ),
        (scheduler.is_encoder_decoder, "encoder-decoder models are not covered"),
        (
            scheduler.vllm_config.model_config.runner_type == "pooling",
            "a pooling model keeps no KV",
        ),
        (scheduler.num_spec_tokens > 0, "draft models keep state of their own"),
        (parallel.decode_context_parallel_size > 1, "context parallelism is not covered"),
        (parallel.prefill_context_parallel_size > 1, "context parallelism is not covered"),
    )
    return next((reason for holds, reason in reasons if holds), "")


def _is_plain(spec: Any) -> bool:
    return isinstance(spec, FullAttentionSpec) and not getattr(spec, "sliding_window", None)


def slot_bytes_of(kv_cache_config: Any) -> int:
    """Bytes of one block of all layers on one rank."""
    (group,) = kv_cache_config.kv_cache_groups
    return len(group.layer_names) * int(group.kv_cache_spec.page_size_bytes)


def default_bytes(device_bytes: int) -> int:
    return min(int(DEFAULT_SHARE * available_bytes()), DEFAULT_DEVICES * device_bytes)
