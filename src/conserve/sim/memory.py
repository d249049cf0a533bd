"""KV blocks: who holds which, what lies in them, and who finds it there."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

from conserve.core.free_order import FreeOrder
from conserve.sim.text import Text


class OutOfBlocksError(RuntimeError):
    """More blocks were taken than are free: a fault of the caller."""


class BlockPool:
    """Blocks with holders and content, as in vLLM with prefix caching.

    A freed block keeps its content until it is handed out again, also that of a finished request,
    and several requests may hold one block. `core.free_order` says which free block goes first: the
    engine asks the same. Only blocks that somebody may look for have names.
    """

    def __init__(self, num_blocks: int, block_size: int, *, class_aware: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free_blocks = num_blocks
        self.order = FreeOrder(num_blocks, class_aware=class_aware)
        self._block_size = block_size
        self._held: dict[str, list[int]] = {}
        self._num_named: dict[str, int] = {}
        """Of whom has some, the leading blocks that have names."""
        self._num_holders = [0] * num_blocks
        self._name_of: list[Hashable | None] = [None] * num_blocks
        self._named: dict[Hashable, list[int]] = {}
        """Blocks that hold the same, if several have computed it at once: the first is found."""

    # What is there

    @property
    def holdings(self) -> dict[str, int]:
        return {owner: len(blocks) for owner, blocks in self._held.items()}

    @property
    def num_held_blocks(self) -> int:
        """Those that somebody holds, each once."""
        return len({block for blocks in self._held.values() for block in blocks})

    def find(self, text: Text, most: int) -> int:
        """Leading blocks of the text that are there, up to `most`."""
        return sum(1 for _ in self.found(text, most))

    def num_in_use(self, text: Text, most: int) -> int:
        """Of those that `find` counts, the ones that somebody holds: they cost no free block."""
        return sum(1 for block in self.found(text, most) if self._num_holders[block])

    def found(self, text: Text, most: int) -> Iterator[int]:
        """Those blocks."""
        named, size = self._named, self._block_size
        for index in range(most):
            blocks = named.get(text.name(index, size))
            if blocks is None:
                return
            yield blocks[0]

    def names_of(self, blocks: Iterable[int]) -> Iterator[Hashable]:
        """Of those that have one."""
        return (name for block in blocks if (name := self._name_of[block]) is not None)

    def table(self, owner: str) -> Iterator[tuple[int, int]]:
        """Its blocks, each with how many hold it."""
        return ((block, self._num_holders[block]) for block in self._held.get(owner, ()))

    # Blocks are given

    def take(self, owner: str, num_blocks: int) -> None:
        """Give free blocks to `owner`. Raises OutOfBlocksError, changing nothing."""
        if num_blocks > self.num_free_blocks:
            raise OutOfBlocksError(f"{owner}: {num_blocks} of {self.num_free_blocks} free blocks")
        self.num_free_blocks -= num_blocks
        taken, name_of, num_holders = self.order.take(num_blocks), self._name_of, self._num_holders
        for block in taken:
            num_holders[block] = 1
            if name_of[block] is not None:
                self._forget(block)
        held = self._held.get(owner)
        if held is None:
            self._held[owner] = taken
        else:
            held += taken

    def claim(self, owner: str, text: Text, most: int) -> int:
        """Give `owner`, who holds nothing, the leading blocks that `find` counts; how many."""
        blocks = list(self.found(text, most))
        for block in blocks:
            if not self._num_holders[block]:
                self.order.remove(block)
                self.num_free_blocks -= 1
            self._num_holders[block] += 1
        if blocks:
            self._held[owner] = blocks
            self._num_named[owner] = len(blocks)
        return len(blocks)

    # What lies in them

    def name(self, owner: str, text: Text, end: int) -> None:
        """Its first `end` blocks hold their part of the text, or will with the step in flight."""
        start = self._num_named.get(owner, 0)
        if start >= end:
            return
        self._num_named[owner] = end
        held, size = self._held[owner], self._block_size
        for index in range(start, end):
            name = text.name(index, size)
            self._name_of[held[index]] = name
            self._named.setdefault(name, []).append(held[index])

    def unname(self, owner: str, end: int) -> list[int]:
        """Nothing came of its blocks from `end` on: which of them had a name."""
        start = self._num_named.get(owner, 0)
        if start <= end:
            return []
        self._num_named[owner] = end
        gone = self._held[owner][end:start]
        for block in gone:
            self._forget(block)
        return gone

    def holds_any(self, owner: str, end: int, blocks: set[int]) -> bool:
        """Whether one of its first `end` blocks is among these."""
        return not blocks.isdisjoint(self._held[owner][:end])

    def _forget(self, block: int) -> None:
        name = self._name_of[block]
        self._name_of[block] = None
        same = self._named[name]
        same.remove(block)
        if not same:
            del self._named[name]

    # Blocks come back

    def free(
        self, owner: str, num_full: int, text: Text | None, reaches: Iterable[int] | None
    ) -> None:
        """Take all blocks from `owner`. The first `num_full` hold what it has computed, which
        others or itself may look for if there is a `text`. `reaches`: see FreeOrder.used_offline;
        None for an online owner."""
        blocks = self._held.get(owner)
        if blocks is None:
            return
        num_full = min(num_full, len(blocks))
        if text is not None:
            self.name(owner, text, num_full)
        self._num_named.pop(owner, None)
        del self._held[owner]
        if reaches is None:
            self.order.used_online(blocks)
        else:
            self.order.used_offline(blocks, reaches)
        full = self._let_go(blocks[:num_full])
        empty = self._let_go(blocks[num_full:])
        if text is not None:
            # Of what it found and never used, others may still find some.
            full, empty = self._split(empty + full)
        self.order.prepend(empty)
        self.order.append(full)
        self.num_free_blocks += len(full) + len(empty)

    def _split(self, blocks: list[int]) -> tuple[list[int], list[int]]:
        """Those with a name, and those without."""
        named = [block for block in blocks if self._name_of[block] is not None]
        return named, [block for block in blocks if self._name_of[block] is None]

    def _let_go(self, blocks: list[int]) -> list[int]:
        """Of those, last one first, the ones that nobody holds any more."""
        num_holders, freed = self._num_holders, []
        for block in reversed(blocks):
            num_holders[block] -= 1
            if not num_holders[block]:
                freed.append(block)
        return freed
