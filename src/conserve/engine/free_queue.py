"""vLLM's queue of free blocks with our order in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import dropwhile, islice
from typing import Any

from conserve.core.free_order import FreeOrder


class FreeQueue:
    """Stands in for vLLM's `FreeKVCacheBlockQueue` in one block pool: the same calls, with
    `FreeOrder` saying who goes first. vLLM's links inside the blocks are unused."""

    def __init__(self, blocks: Sequence[Any], order: FreeOrder) -> None:
        """`blocks` are the pool's, by id."""
        self._blocks = blocks
        self.order = order
        self.num_free_blocks = len(order)

    @classmethod
    def into(cls, pool: Any, *, class_aware: bool) -> FreeQueue:
        """Put one into vLLM's block pool, in place of its own."""
        free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        order = FreeOrder(len(pool.blocks), free, class_aware=class_aware)
        pool.free_block_queue = queue = cls(pool.blocks, order)
        return queue

    def popleft(self) -> Any:
        """Raises ValueError where no block is free, as vLLM's does."""
        if not self.num_free_blocks:
            raise ValueError("No free blocks available")
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[Any]:
        taken = self.order.take(n)
        self.num_free_blocks -= n
        blocks = self._blocks
        return [blocks[block_id] for block_id in taken]

    def remove(self, block: Any) -> None:
        """Raises RuntimeError where the block is not free, as vLLM's does."""
        try:
            self.order.remove(block.block_id)
        except KeyError:
            raise RuntimeError(f"remove() called on an invalid block: {block}") from None
        self.num_free_blocks -= 1

    def append(self, block: Any) -> None:
        self.append_n([block])

    def append_n(self, blocks: Sequence[Any]) -> None:
        self.order.append([block.block_id for block in blocks])
        self.num_free_blocks += len(blocks)

    def prepend_n(self, blocks: Sequence[Any]) -> None:
        self.order.prepend([block.block_id for block in blocks])
        self.num_free_blocks += len(blocks)

    def get_all_free_blocks(self) -> list[Any]:
        return list(self.iter_blocks_after(None))

    def iter_blocks_after(self, cursor: Any) -> Iterator[Any]:
        """Those that are handed out after `cursor`, next first; all of them if it is None. Walks
        past those before it. None where the cursor is not free any more."""
        ids = iter(self.order)
        if cursor is not None:
            ids = islice(dropwhile(lambda block_id: block_id != cursor.block_id, ids), 1, None)
        return (self._blocks[block_id] for block_id in ids)
