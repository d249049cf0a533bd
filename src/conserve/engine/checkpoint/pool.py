"""Which host slot holds which block of which request (scheduler process; no bytes in here).

A slot holds the bytes of one KV block on every rank. Numbers 0 to num_slots - 1 are slots in
host memory, the num_disk_slots numbers after them are slots in a file. The workers carry out
every operation on slots in the order in which the scheduler sent it (one queue a worker), so a
slot may be given to somebody else while an older operation on it is still queued.

Half-open token ranges of one request, left to right:

    [0, entry.num_tokens)                        in the slots on all ranks: can be restored
    [entry.num_tokens, len(slots) * block_size)  reserved; copies may be queued or running
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Entry:
    """One request's checkpoint. Whoever holds one sees by `alive` that it was evicted."""

    request_id: str
    slots: list[int] = field(default_factory=list)
    """Slot of each block, from the first block on."""
    num_tokens: int = 0
    """Leading tokens whose bytes lie in the slots, on all ranks."""
    value: float = 0.0
    """Worth of keeping it, per byte; the entry of least value is evicted first."""
    alive: bool = True
    """False once the pool has forgotten it: its slots may be somebody else's."""


class HostPool:
    """Slots, who has them, and who loses them. No I/O, no clock; every method O(blocks of one
    request), eviction O(entries) besides."""

    def __init__(self, block_size: int, num_slots: int, num_disk_slots: int = 0) -> None: ...

    def entry(self, request_id: str) -> Entry | None:
        """The request's live entry."""
        raise NotImplementedError

    def reserve(
        self, request_id: str, num_blocks: int, hashes: Sequence[bytes], value: float
    ) -> Entry | None:
        """Grow the request's entry (made at the first call) to `num_blocks` slots.

        `hashes` are the block hashes of its leading full blocks. A new block whose hash some
        slot already holds *in full* (see `mark`) shares that slot, with a reference count; if
        that makes a longer prefix restorable, `num_tokens` grows at once. All others get a slot
        of their own, in host memory.

        Where slots lack, whole entries of a lower value than `value` yield, least first: to
        the disk tier if it has room (in host memory their slots are free then; see
        `take_moves`), else forgotten (`alive` = False). Never the caller's own. Returns None,
        changing nothing but the value, if even that is not enough.

        An entry that was demoted to disk grows with slots in host memory: an entry may have
        slots of both kinds.
        """
        raise NotImplementedError

    def mark(self, entry: Entry, num_tokens: int, hashes: Sequence[bytes]) -> None:
        """All ranks have copied the request's first `num_tokens` tokens (never fewer than
        before, else it is ignored; ignored too for an entry that is not alive).

        Full blocks enter the index of shared blocks here, under their hashes. One whose hash
        is indexed already gives its own slot back and shares the other.
        """
        raise NotImplementedError

    def value(self, request_id: str, value: float) -> None:
        """Set what the request's entry is worth; nothing happens without one."""
        raise NotImplementedError

    def lost(self, slots: Sequence[int]) -> list[str]:
        """The bytes of these slots are gone or wrong on some rank: every entry that uses one
        is cut before it (and forgotten where nothing is left). Returns the requests hit."""
        raise NotImplementedError

    def release(self, request_id: str) -> None:
        """The request is done: its entry is forgotten, its slots' references given back."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forget everything (the weights have changed, or the prefix cache was reset)."""
        raise NotImplementedError

    def take_moves(self) -> list[tuple[int, int]]:
        """(from slot, to slot) since the last call, in order: the workers carry them out before
        they write to any slot that was reserved since."""
        raise NotImplementedError

    # Figures, for metrics
    num_evicted: int = 0
    """Entries forgotten for lack of room, ever."""
    num_demoted: int = 0
    """Entries moved to disk, ever."""

    @property
    def num_used(self) -> int:
        """Slots in host memory that hold or await something."""
        raise NotImplementedError

    @property
    def num_disk_used(self) -> int:
        raise NotImplementedError
