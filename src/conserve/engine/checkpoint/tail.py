"""What the host lacks of a request that is displaced: what it costs to copy, and to compute."""

from __future__ import annotations

from typing import NamedTuple

from conserve.engine.checkpoint.pool import HostPool


class Tail(NamedTuple):
    """Of a request that has so many tokens computed."""

    copied_tokens: float
    """Tokens whose KV is as large as what is to be copied."""
    lost_tokens: int
    """To be computed again where it is not; 0: nothing lacks."""
    context: int
    """Tokens before those."""

    @classmethod
    def of(cls, pool: HostPool, request_id: str, num_computed: int) -> Tail:
        covered = min(pool.num_covered_tokens(request_id), num_computed)
        size = pool.block_size
        copied = -(-(num_computed - covered) // size) * size
        if pool.states.has(request_id, num_computed):
            return cls(copied, num_computed - covered, covered)
        # Without its state nothing behind the last one that was copied can be brought back.
        kept = pool.num_restorable_tokens(request_id, covered)
        return cls(copied + pool.state_tokens, num_computed - kept, kept)
