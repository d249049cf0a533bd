"""KV blocks: how many tokens take how many, and what requests lack of theirs."""

from __future__ import annotations

from collections.abc import Iterable

from conserve.core.kv_groups import KVGroups
from conserve.core.snapshot import RequestView

Memory = int | KVGroups
"""Tokens in a block, where all layers keep all tokens in one block table; else their groups."""

UNCOUNTED = 1 << 60
"""Free blocks of an engine whose model keeps no KV: whatever a request needs is there."""


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def blocks_cost(first: int, end: int, block_size: int) -> int:
    """Tokens' worth of bytes in the blocks that [first, end) touches; `first` starts a block."""
    return blocks_for(end - first, block_size) * block_size


def num_tables(memory: Memory) -> int:
    """Block tables of a request: each of them may lack a block for its next token."""
    return 1 if isinstance(memory, int) else len(memory.groups)


def held_blocks(num_computed: int, memory: Memory) -> int:
    """Of a request with so many tokens computed."""
    if isinstance(memory, int):
        return blocks_for(num_computed, memory)
    return memory.blocks_for(num_computed, num_computed)


def lacking_blocks(request: RequestView, memory: Memory) -> int:
    """Free blocks a request needs beyond its own, and those that it shares, for all its known
    tokens."""
    lacking = _needed(request, memory) - request.num_blocks
    if not request.num_blocks:
        lacking -= request.num_borrowed_blocks
    return lacking if lacking > 0 else 0


def promised_blocks(running: Iterable[RequestView], memory: Memory) -> int:
    """Blocks that running requests' known tokens lack yet: promised when they were admitted."""
    if not isinstance(memory, int):
        return sum(max(0, _needed(one, memory) - one.num_blocks) for one in running)
    promised = 0
    for request in running:
        # `lacking_blocks`, without a call for each of hundreds.
        ahead = request.num_tokens + request.num_lookahead_tokens
        lacking = -(-ahead // memory) - request.num_blocks
        if lacking > 0:
            promised += lacking
    return promised


def _needed(request: RequestView, memory: Memory) -> int:
    ahead = request.num_tokens + request.num_lookahead_tokens
    if isinstance(memory, int):
        return blocks_for(ahead, memory)
    return memory.blocks_for(ahead, request.num_computed_tokens)
