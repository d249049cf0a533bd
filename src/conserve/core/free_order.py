"""In which order free KV blocks are handed out: what nobody will ask for again goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

ONLINE = 4
"""Rank of blocks that an online request used. Below it are those that offline requests used, by
how many waiting ones begin with them: none (0), one (1), two or three (2), more (3)."""
MOST_RANK_FROM = 4
"""Waiting requests that begin with a block of rank 3; more make no difference."""


def _ignore(block_ids: Sequence[int]) -> None:
    """Nobody wants to know what was forgotten."""


class FreeOrder:
    """The free ones of the blocks 0 to `num_blocks` - 1, in the order in which they are handed out:
    by rank, and the least recently freed first within a rank.

    A block keeps its rank while it is used and while it is free, until it is handed out anew.
    Every call costs what its blocks cost, however many others are free.
    """

    def __init__(
        self, num_blocks: int, free: Iterable[int] | None = None, *, class_aware: bool = True
    ) -> None:
        """`free`: those free from the start, next first; all of them if None. Without
        `class_aware` ranks are kept and the order does not heed them, as in vLLM."""
        self._rank = bytearray(num_blocks)
        self._class_aware = class_aware
        self._regions: tuple[OrderedDict[int, None], ...] = tuple(
            OrderedDict() for _ in range(ONLINE + 1)
        )
        self._regions[0].update(dict.fromkeys(range(num_blocks) if free is None else free))
        self.forgets: Callable[[Sequence[int]], None] = _ignore
        """Told of free blocks of online history right before they are handed out."""

    def __len__(self) -> int:
        return sum(map(len, self._regions))

    def __iter__(self) -> Iterator[int]:
        return chain(*self._regions)

    def is_online(self, block_id: int) -> bool:
        """Whether an online request used the block since it was last handed out."""
        return self._rank[block_id] == ONLINE

    @property
    def num_online(self) -> int:
        """Free blocks that online requests used; 0 where the order does not heed it."""
        return len(self._regions[ONLINE])

    # Blocks leave

    def take(self, count: int) -> list[int]:
        """Hand out the first `count`, which must be free."""
        first = self._regions[0]
        if self._class_aware and len(first) >= count:
            # Nearly always, and in every step: these have no rank to lose.
            pop = first.popitem
            return [pop(False)[0]] if count == 1 else [pop(False)[0] for _ in range(count)]
        taken: list[int] = []
        for region in self._regions:
            number = min(count - len(taken), len(region))
            taken += [region.popitem(last=False)[0] for _ in range(number)]
        assert len(taken) == count, f"{count} blocks asked for, {len(taken)} free"
        rank = self._rank
        ranked = [block_id for block_id in taken if rank[block_id]]
        if online := [block_id for block_id in ranked if rank[block_id] == ONLINE]:
            self.forgets(online)
        for block_id in ranked:
            rank[block_id] = 0
        return taken

    def remove(self, block_id: int) -> None:
        """A request found what it needs in a free block; KeyError if the block is not free."""
        region = self._regions[self._rank[block_id] if self._class_aware else 0]
        del region[block_id]

    # Blocks come back

    def append(self, block_ids: Iterable[int]) -> None:
        """Freed with content that may be asked for, in the order in which they are to go."""
        if not self._class_aware:
            self._regions[0].update(dict.fromkeys(block_ids))
            return
        rank, regions = self._rank, self._regions
        for block_id in block_ids:
            regions[rank[block_id]][block_id] = None

    def prepend(self, block_ids: Sequence[int]) -> None:
        """Freed without content: the first of all, in this order."""
        first = self._regions[0]
        for block_id in reversed(block_ids):
            self._rank[block_id] = 0
            first[block_id] = None
            first.move_to_end(block_id, last=False)

    # What is in blocks that are about to come back

    def used_online(self, block_ids: Iterable[int]) -> None:
        """An online request lets go of these. Call it before they are freed, and also where others
        still hold them."""
        for block_id in block_ids:
            self._rank[block_id] = ONLINE

    def used_offline(self, block_ids: Sequence[int], reaches: Iterable[int]) -> None:
        """An offline request lets go of these, in the order of its tokens; call it before they are
        freed. `reaches`: for each waiting offline request that is looked at, how many of the
        leading blocks it begins with. What online requests used stays theirs."""
        wanted = sorted(reaches, reverse=True)[:MOST_RANK_FROM]
        start = 0
        for rank in (3, 2, 1, 0):
            fewest = 1 << rank >> 1
            end = len(block_ids) if not rank else wanted[fewest - 1] if fewest <= len(wanted) else 0
            for block_id in block_ids[start:end]:
                if self._rank[block_id] != ONLINE:
                    self._rank[block_id] = rank
            start = max(start, end)

    def forget(self) -> None:
        """Nothing that lies in free blocks is worth anything any more."""
        free = list(self)
        for region in self._regions:
            region.clear()
        self._regions[0].update(dict.fromkeys(free))
        self._rank = bytearray(len(self._rank))
