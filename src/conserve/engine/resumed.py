"""Displaced requests of a model without KV, as vLLM's Model Runner V1 wants to hear of them."""

from __future__ import annotations

from typing import Any


def name_no_blocks(output: Any, num_groups: int) -> None:
    """In this scheduler output, say of every request that comes back after a displacement which
    blocks it has: in a model without KV groups, none. vLLM says None of them, as of a request that
    keeps its blocks, and the runner fails on that. In place."""
    cached = output.scheduled_cached_reqs
    if num_groups or not cached.resumed_req_ids:
        return
    cached.new_block_ids = [
        () if name in cached.resumed_req_ids else block_ids
        for name, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True)
    ]
