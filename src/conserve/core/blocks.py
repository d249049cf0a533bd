"""KV blocks: how many tokens take how many, and what requests lack of theirs."""

from __future__ import annotations

from collections.abc import Iterable

from conserve.core.snapshot import RequestView

UNCOUNTED = 1 << 60
"""Free blocks of an engine whose model keeps no KV: whatever a request needs is there."""


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def blocks_cost(first: int, end: int, block_size: int) -> int:
    """Tokens' worth of bytes in the blocks that [first, end) touches; `first` starts a block."""
    return blocks_for(end - first, block_size) * block_size


def lacking_blocks(request: RequestView, block_size: int) -> int:
    """Free blocks a request needs beyond its own, and those that it shares, for all its known
    tokens."""
    lacking = -(-request.num_tokens // block_size) - request.num_blocks
    if not request.num_blocks:
        lacking -= request.num_borrowed_blocks
    return lacking if lacking > 0 else 0


def promised_blocks(running: Iterable[RequestView], block_size: int) -> int:
    """Blocks that running requests' known tokens lack yet: promised when they were admitted."""
    promised = 0
    for request in running:
        # `lacking_blocks`, without a call for each of hundreds.
        lacking = -(-request.num_tokens // block_size) - request.num_blocks
        if lacking > 0:
            promised += lacking
    return promised
