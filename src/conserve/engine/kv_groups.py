"""vLLM's KV cache groups, as the policy and the checkpoints know them."""

from __future__ import annotations

from typing import Any

from conserve.core.kv_groups import KVGroup, KVGroups
from conserve.engine.door import ChunkedLocalAttentionSpec, MambaSpec, SlidingWindowSpec
from conserve.engine.scheduler_view import SchedulerView


def kv_group_of(spec: Any, most_blocks: int | None = None) -> KVGroup:
    """That of vLLM's with layers of this kind. One that windows move over, but whose blocks vLLM
    keeps (`--disable-hybrid-kv-cache-manager`), keeps all."""
    size = int(spec.block_size)
    # Of layers of several widths all have the same window.
    one = next(iter(getattr(spec, "kv_cache_specs", {}).values()), spec)
    if isinstance(one, SlidingWindowSpec):
        return KVGroup(
            size, window=one.sliding_window + one.extra_retained_tokens, most_blocks=most_blocks
        )
    if isinstance(one, ChunkedLocalAttentionSpec):
        return KVGroup(size, chunk=one.attention_chunk_size, most_blocks=most_blocks)
    if isinstance(one, MambaSpec):
        drafts = int(one.num_speculative_blocks)
        return KVGroup(size, is_state=True, spare_blocks=drafts, most_blocks=_most_states(one))
    return KVGroup(size)


def _most_states(spec: Any) -> int:
    """That of a request are there at a time: one for each token that a step may end with and, where
    vLLM keeps states at the ends of blocks, the one that the step begins with."""
    written = 1 + int(spec.num_speculative_blocks)
    if spec.mamba_cache_mode != "align":
        return written
    return 1 + written + int(spec.num_prefill_checkpoint_blocks)


def kv_groups_of(scheduler: SchedulerView) -> KVGroups | None:
    """None where all layers keep all tokens in one block table, or nothing at all."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    groups = tuple(
        kv_group_of(manager.kv_cache_spec, manager.max_admission_blocks_per_request)
        for manager in managers
    )
    several = len(groups) > 1 or not all(group.keeps_all for group in groups)
    return KVGroups(groups) if several else None
