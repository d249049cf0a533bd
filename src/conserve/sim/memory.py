"""KV blocks: who holds how many, and what freed ones still remember."""

from __future__ import annotations

from collections import OrderedDict

from conserve.core.free_order import ONLINE

RETURNS = 1
"""Rank of what a waiting request will look for itself (see `core.free_order`)."""


class OutOfBlocksError(RuntimeError):
    """More blocks were taken than are free: a fault of the caller."""


class BlockPool:
    """Blocks with owners. Which block is whose is counted, not drawn: blocks are alike.

    As in vLLM with prefix caching, a freed block keeps its content until it is taken
    again, also that of a finished request: blocks without content go first, then by rank
    (unless not `class_aware`) those freed longest ago, a request's last block first.
    `reclaim` gives a returning request what is left of its own.

    free = blank + sum(remembered);  total = free + sum(held).
    """

    def __init__(
        self, num_blocks: int, *, prefix_caching: bool = True, class_aware: bool = True
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free_blocks = num_blocks
        self._prefix_caching = prefix_caching
        self._held: dict[str, int] = {}
        self._class_aware = class_aware
        self._remembered: dict[int, OrderedDict[str, int]] = {
            rank: OrderedDict() for rank in (0, RETURNS, ONLINE)
        }
        self._num_blank = num_blocks

    @property
    def holdings(self) -> dict[str, int]:
        return dict(self._held)

    def remembered_of(self, owner: str) -> int:
        """Leading blocks that `owner` would get back from `reclaim`."""
        return sum(region.get(owner, 0) for region in self._remembered.values())

    def take(self, owner: str, num_blocks: int) -> None:
        """Give free blocks to `owner`. Raises OutOfBlocksError, changing nothing."""
        if num_blocks > self.num_free_blocks:
            raise OutOfBlocksError(f"{owner}: {num_blocks} of {self.num_free_blocks} free blocks")
        self.num_free_blocks -= num_blocks
        self._held[owner] = self._held.get(owner, 0) + num_blocks
        blank = min(num_blocks, self._num_blank)
        self._num_blank -= blank
        self._forget(num_blocks - blank)

    def free(self, owner: str, *, num_remembered: int = 0, rank: int = 0) -> int:
        """Take all blocks from `owner`; returns how many. The first ones may be remembered, with
        the rank that they then have."""
        count = self._held.pop(owner, 0)
        self.num_free_blocks += count
        kept = min(count, num_remembered) if self._prefix_caching else 0
        if kept:
            self._remembered[rank if self._class_aware else 0][owner] = kept
        self._num_blank += count - kept
        return count

    def reclaim(self, owner: str, most: int) -> int:
        """Give `owner` back up to `most` leading blocks that still hold its KV."""
        kept = sum(region.pop(owner, 0) for region in self._remembered.values())
        back = min(kept, most)
        self._num_blank += kept - back
        if back:
            self.num_free_blocks -= back
            self._held[owner] = self._held.get(owner, 0) + back
        return back

    def _forget(self, num_blocks: int) -> None:
        for region in self._remembered.values():
            while region and num_blocks > 0:
                owner, count = next(iter(region.items()))
                lost = min(count, num_blocks)
                num_blocks -= lost
                if lost == count:
                    del region[owner]
                else:
                    region[owner] = count - lost
