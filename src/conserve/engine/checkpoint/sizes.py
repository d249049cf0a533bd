"""How large the host pool is, and why an engine may have none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from conserve.engine.checkpoint.bandwidth import Bandwidth
from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.conversations import Conversations
from conserve.engine.checkpoint.pool import HostPool
from conserve.engine.door import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    init_logger,
)
from conserve.engine.host_memory import available_bytes
from conserve.engine.kv_groups import kv_group_of
from conserve.engine.settings import CHECKPOINT_SHARE, EngineSettings
from conserve.engine.speculation import is_shown
from conserve.engine.stats import EngineStats

logger = init_logger("vllm.conserve")

DEFAULT_DEVICES = 4
"""At most this many times the KV cache itself, by default."""


@dataclass(frozen=True)
class PoolSize:
    """Of one rank, which works it out by itself. What all of them use is the least that one could
    get: the scheduler hears of it."""

    num_slots: int = 0
    num_disk_slots: int = 0
    slot_bytes: int = 0
    why_none: str = ""

    @classmethod
    def of(cls, vllm_config: Any, kv_cache_config: Any, settings: EngineSettings) -> PoolSize:
        reason = why_no_checkpoints(vllm_config, kv_cache_config, settings)
        if reason:
            return cls(why_none=reason)
        slot_bytes = slot_bytes_of(kv_cache_config)
        block_bytes = slot_bytes * vllm_config.parallel_config.world_size
        device_bytes = kv_cache_config.num_blocks * block_bytes
        pool_bytes = settings.checkpoint_bytes or default_bytes(device_bytes)
        if pool_bytes < block_bytes:
            size = f"checkpoint_bytes ({pool_bytes})"
            return cls(why_none=f"{size} holds not one block of {slot_bytes} bytes")
        num_disk_slots = _num_disk_slots(settings, block_bytes)
        return cls(pool_bytes // block_bytes, num_disk_slots, slot_bytes)


def _num_disk_slots(settings: EngineSettings, block_bytes: int) -> int:
    return settings.checkpoint_dir_bytes // block_bytes if settings.checkpoint_dir else 0


def make_checkpointer(
    vllm_config: Any, kv_cache_config: Any, settings: EngineSettings, stats: EngineStats
) -> Checkpointer:
    """The scheduler's half of checkpoints; one that keeps none knows why."""
    if reason := why_no_checkpoints(vllm_config, kv_cache_config, settings):
        return no_checkpoints(reason)
    num_ranks = vllm_config.parallel_config.world_size
    slot_bytes = slot_bytes_of(kv_cache_config)
    pool = _empty_pool(kv_cache_config, _num_disk_slots(settings, slot_bytes * num_ranks))
    return Checkpointer(
        pool,
        Bandwidth(slot_bytes / pool.slot_tokens, settings.checkpoint_bytes_per_s),
        num_ranks=num_ranks,
        incremental=settings.checkpoint == "incremental",
        stats=stats,
        conversations=None
        if why_no_conversations(vllm_config, settings, pool)
        else Conversations(pool.hash_tokens),
    )


def _empty_pool(kv_cache_config: Any, num_disk_slots: int) -> HostPool:
    groups = [kv_group_of(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]
    sizes = [group.block_size for group in groups if not group.is_state]
    sizes = sizes or [group.block_size for group in groups]
    hash_tokens = getattr(kv_cache_config, "hash_block_size", None) or math.gcd(*sizes)
    return HostPool(0, math.lcm(*sizes), num_disk_slots, groups=groups, hash_tokens=hash_tokens)


def why_no_conversations(vllm_config: Any, settings: EngineSettings, pool: HostPool) -> str:
    """The reason why an engine that keeps checkpoints keeps nothing of online requests that have
    ended, or nothing if it does."""
    caching = vllm_config.cache_config.enable_prefix_caching
    reasons = (
        (not settings.checkpoint_online, "switched off (checkpoint_online: false)"),
        (settings.checkpoint != "incremental", f"copies wait (checkpoint: {settings.checkpoint})"),
        (not caching, "they are found by the hashes of prefix caching, which is off"),
        (len(pool.states) > 0, "recurrent state is copied of displaced requests alone"),
    )
    return next((reason for holds, reason in reasons if holds), "")


def no_checkpoints(reason: str) -> Checkpointer:
    """One that keeps nothing and brings nothing back."""
    return Checkpointer(HostPool(0, 1), Bandwidth(1.0), num_ranks=1, unusable=reason)


def why_no_checkpoints(vllm_config: Any, kv_cache_config: Any, settings: EngineSettings) -> str:
    """The reason why displaced requests compute again, or nothing if they may be restored."""
    groups = kv_cache_config.kv_cache_groups
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    drafting = vllm_config.speculative_config
    reasons = (
        (settings.checkpoint == "off", "switched off (checkpoint: off)"),
        (
            kv_cache_config.needs_kv_cache_zeroing and not _is_ours(parallel.worker_cls),
            "vLLM clears new blocks, and the worker class is not ours: no copy comes before that",
        ),
        (not groups, "the model keeps no KV"),
        (
            not all(_is_plain(spec) for group in groups for spec in _layer_specs(group)),
            "layers with another cache than attention's (of all tokens, a window, a chunk) or "
            "recurrent state are not covered",
        ),
        (model.is_encoder_decoder, "encoder-decoder models are not covered"),
        (model.runner_type == "pooling", "a pooling model keeps no KV"),
        (
            drafting is not None and not is_shown(drafting),
            "restores beside drafts of this kind were not tried",
        ),
        (
            drafting is not None
            and any(isinstance(s, MambaSpec) for g in groups for s in _layer_specs(g)),
            "recurrent state of drafts lies in blocks of its own",
        ),
        (parallel.decode_context_parallel_size > 1, "context parallelism is not covered"),
        (parallel.prefill_context_parallel_size > 1, "context parallelism is not covered"),
    )
    return next((reason for holds, reason in reasons if holds), "")


def _is_ours(worker_class: Any) -> bool:
    return str(worker_class).startswith("conserve.")


def _is_plain(spec: Any) -> bool:
    """One state a token, in blocks that are the request's alone until it ends or its window leaves
    them, or one state of its last token. What derives from these keeps tokens otherwise: shares
    some, stores states of other kinds."""
    if type(spec) is MambaSpec:
        return True
    plain = (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)
    return type(spec) in plain and spec.tokens_per_state == 1


def _layer_specs(group: Any) -> list[Any]:
    """A worker is told of each layer where they differ in width, the scheduler of one of them."""
    spec = group.kv_cache_spec
    several = getattr(spec, "kv_cache_specs", {})
    return list(several.values()) or [spec] * len(group.layer_names)


def slot_bytes_of(kv_cache_config: Any) -> int:
    """Bytes of one block on one rank: of the layers of the widest group. The groups take their
    blocks from the same memory."""
    return max(
        sum(int(spec.page_size_bytes) for spec in _layer_specs(group))
        for group in kv_cache_config.kv_cache_groups
    )


def default_bytes(device_bytes: int) -> int:
    return min(int(CHECKPOINT_SHARE * available_bytes()), DEFAULT_DEVICES * device_bytes)
