"""Groups of layers that keep KV alike: which blocks of a request they hold, and how many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers with one block table. All groups take their blocks from one pool."""

    block_size: int
    """In tokens."""
    window: int | None = None
    """Tokens that a token attends to, itself included; None: all before it."""
    chunk: int | None = None
    """A token attends to those of its own stretch of so many alone."""
    is_state: bool = False
    """Recurrent layers: what they keep of a request is of its last token alone, in the block of
    that token, and the next step writes over it."""
    spare_blocks: int = 0
    """Held beside those of its tokens: states that a step may end with, for its drafts."""
    most_blocks: int | None = None
    """That a request ever holds in it; None: of all its tokens."""

    @property
    def keeps_all(self) -> bool:
        return not (self.has_window or self.is_state)

    @property
    def has_window(self) -> bool:
        """Whether a running request gives blocks back."""
        return self.window is not None or self.chunk is not None

    def first_needed(self, num_tokens: int) -> int:
        """The first block that a request with so many tokens computed needs still. The engine gives
        those before it to others, the request's window having left them."""
        if self.window is not None:
            return max(0, num_tokens - self.window + 1) // self.block_size
        if self.chunk is not None:
            return num_tokens // self.chunk * self.chunk // self.block_size
        if self.is_state:
            return max(0, num_tokens - 1) // self.block_size
        return 0

    def blocks_for(self, num_tokens: int, num_computed: int) -> int:
        """Held at most on the way from `num_computed` tokens to `num_tokens`."""
        count = -(-num_tokens // self.block_size) - self.first_needed(num_computed)
        count += self.spare_blocks if num_tokens else 0
        return count if self.most_blocks is None else min(count, self.most_blocks)


def tokens_of_a_block(groups: Sequence[KVGroup]) -> float:
    """Tokens whose KV, of all groups, is as large as one block. Recurrent layers keep no tokens:
    where there are no others, as many as a block of theirs spans."""
    kept = [group for group in groups if not group.is_state] or groups[:1]
    return 1 / sum(1 / group.block_size for group in kept)


@dataclass(frozen=True)
class KVGroups:
    """All groups of a model."""

    groups: tuple[KVGroup, ...]
    _kinds: tuple[tuple[KVGroup, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Most groups of a model are equal, and this is asked for every request in every step.
        object.__setattr__(self, "_kinds", tuple(Counter(self.groups).items()))

    def blocks_for(self, num_tokens: int, num_computed: int) -> int:
        """Of the pool, held at most on the way from `num_computed` tokens to `num_tokens`."""
        return sum(
            count * group.blocks_for(num_tokens, num_computed) for group, count in self._kinds
        )
