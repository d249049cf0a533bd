"""Who owns which checkpoint slot. Lives in the scheduler's process and touches no bytes.

A slot holds one block's worth of KV of every layer, on each rank under the same number.

    tokens of a request   [0 ........................... num_tokens) [num_tokens ... reserved)
    its slots             | slots[0] | slots[1] | ... | slots[i] partly |
                          complete, readable                          being written, or empty
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import takewhile

from conserve.engine.checkpoint.entry import Entry, Move, Span, Worth
from conserve.engine.checkpoint.eviction import Eviction
from conserve.engine.checkpoint.slot_table import SlotTable

__all__ = ["Entry", "HostPool", "Move", "Span", "Worth"]


class HostPool:
    """Bounded slots. Full blocks are shared by hash, so a common prefix is held once.

    counts: refused_too_large (requests that the whole host tier could not hold), evicted,
    demoted, lost (requests); the reader may clear it.
    """

    def __init__(self, num_slots: int, block_size: int, num_disk_slots: int = 0) -> None:
        self.block_size = block_size
        self.num_slots = num_slots
        self.num_disk_slots = num_disk_slots
        self.counts: Counter[str] = Counter()
        self._entries: dict[str, Entry] = {}
        self._table = SlotTable(num_slots, num_disk_slots)
        self._eviction = Eviction(self._entries, self._table, self.counts)
        self._too_large: set[str] = set()

    # What is there

    @property
    def num_used_slots(self) -> int:
        return self.num_slots - len(self._table.free)

    @property
    def num_used_disk_slots(self) -> int:
        return self.num_disk_slots - len(self._table.free_on_disk)

    def num_slots_of(self, *, online: bool) -> int:
        """Used slots of both tiers by class; one that both use is an online one."""
        return self._table.num_used_by(online=online)

    def get(self, request_id: str) -> Entry | None:
        """The entry as it stands; changed by this class only."""
        entry = self._entries.get(request_id)
        return None if entry is None or entry.leaving else entry

    def num_covered_tokens(self, request_id: str) -> int:
        entry = self.get(request_id)
        return entry.num_tokens if entry else 0

    def num_shared_tokens(self, block_hashes: Sequence[Hashable]) -> int:
        """Leading tokens of whoever has these full blocks that are complete in the pool."""
        known = self._table.slot_of
        return self.block_size * sum(1 for _ in takewhile(known.__contains__, block_hashes))

    def is_on_disk(self, slot: int) -> bool:
        return self._table.is_on_disk(slot)

    def spans(self, request_id: str, start: int, stop: int) -> list[Span]:
        """Tokens [start, stop), block by block, without blocks that somebody else's copy
        completed already. Raises KeyError without an entry, IndexError past its slots."""
        slots, size = self._entries[request_id].slots, self.block_size
        found = []
        for index in range(start // size, -(-stop // size)):
            first = index * size
            if slots[index] not in self._table.hash_of:
                low, high = max(start - first, 0), min(stop - first, size)
                found.append(Span(index, slots[index], low, high))
        return found

    # A request's checkpoint grows

    def grow(
        self,
        request_id: str,
        num_tokens: int,
        block_hashes: Sequence[Hashable],
        worth: Worth,
        *,
        online: bool = False,
    ) -> bool:
        """Have slots for the leading `num_tokens` tokens; block_hashes[i] names full block i.

        Full blocks that are in the pool already are shared and count as complete. A partly filled
        block on disk is begun anew in memory: `num_tokens` of the entry goes back to its start.
        Where slots lack, entries of lower rank are demoted or evicted, whole. False if that would
        not do: nobody is evicted then, and what the request has stays.
        """
        entry = self._entries.setdefault(request_id, Entry(request_id, worth, online))
        if entry.leaving:
            return False
        entry.worth = worth
        wanted = -(-num_tokens // self.block_size)
        if wanted > self.num_slots:
            if request_id not in self._too_large:
                self._too_large.add(request_id)
                self.counts["refused_too_large"] += 1
            return self._refuse(entry)
        self._share(entry, block_hashes[:wanted])
        on_disk = self._open_on_disk(entry) if num_tokens > entry.num_tokens else []
        lacking, free = wanted - len(entry.slots) + len(on_disk), self._table.free
        stays = bool(on_disk and entry.num_pins)
        if stays or not (lacking <= len(free) or self._eviction.make_room(lacking, entry, wanted)):
            return self._refuse(entry)
        self._begin_anew(entry, on_disk)
        for _ in range(lacking):
            self._own(entry, free.pop())
        self._advance(entry, entry.num_tokens)
        return True

    def _share(self, entry: Entry, block_hashes: Sequence[Hashable]) -> None:
        """Have what the pool has of them behind its complete tokens: in place of its own slots
        that are not complete, too, while no copy fills those."""
        known, end = self._table.slot_of, len(entry.slots)
        first = entry.num_tokens // self.block_size
        for index, block_hash in enumerate(block_hashes[first:end], first):
            if block_hash in known:
                self._publish(entry, index, block_hash)
        for block_hash in takewhile(known.__contains__, block_hashes[end:]):
            self._own(entry, known[block_hash])
        self._advance(entry, entry.num_tokens)

    def _open_on_disk(self, entry: Entry) -> list[int]:
        """Its slots from the one that is partly filled, if that was moved to the disk."""
        first = entry.num_tokens // self.block_size
        rest = entry.slots[first:]
        return rest if rest and self.is_on_disk(rest[0]) else []

    def _begin_anew(self, entry: Entry, slots: list[int]) -> None:
        """Copies write to memory alone: what those last slots held is copied again."""
        del entry.slots[len(entry.slots) - len(slots) :]
        entry.num_tokens = min(entry.num_tokens, len(entry.slots) * self.block_size)
        for slot in slots:
            self._table.disown(slot, online=entry.online)

    def _refuse(self, entry: Entry) -> bool:
        if not entry.slots and not entry.num_pins:
            del self._entries[entry.request_id]
        else:
            self._advance(entry, entry.num_tokens)
        return False

    def _own(self, entry: Entry, slot: int) -> None:
        entry.slots.append(slot)
        self._table.own(slot, online=entry.online)

    def written(self, request_id: str, num_tokens: int, block_hashes: Sequence[Hashable]) -> None:
        """The bytes of the leading `num_tokens` tokens are in the slots, on every rank. Blocks
        that this completes are shared from here on; one that is in the pool twice is merged."""
        entry = self.get(request_id)
        if entry is None or num_tokens <= entry.num_tokens:
            return
        first = entry.num_tokens // self.block_size
        for index in range(first, min(num_tokens // self.block_size, len(block_hashes))):
            self._publish(entry, index, block_hashes[index])
        self._advance(entry, num_tokens)

    def _publish(self, entry: Entry, index: int, block_hash: Hashable) -> None:
        table, slot = self._table, entry.slots[index]
        known = table.slot_of.get(block_hash)
        if known is None and slot not in table.hash_of:
            table.publish(slot, block_hash)
        elif known is not None and known != slot and not entry.num_pins:
            table.own(known, online=entry.online)
            entry.slots[index] = known
            table.disown(slot, online=entry.online)

    def _advance(self, entry: Entry, num_tokens: int) -> None:
        """Complete up to `num_tokens`, and through the shared blocks right behind."""
        index = num_tokens // self.block_size
        while index < len(entry.slots) and entry.slots[index] in self._table.hash_of:
            index += 1
            num_tokens = index * self.block_size
        entry.num_tokens = num_tokens

    # Copies in flight

    def pin(self, request_id: str) -> None:
        """Before a copy into or out of its slots is handed to the workers."""
        self._entries[request_id].num_pins += 1

    def unpin(self, request_id: str) -> None:
        """Once that copy is finished, or dropped, on every rank."""
        entry = self._entries[request_id]
        assert entry.num_pins > 0, f"{request_id} has no copy in flight"
        entry.num_pins -= 1
        if entry.leaving and not entry.num_pins:
            self._eviction.release(entry)

    def take_moves(self) -> list[Move]:
        """Moves decided since the last call, in order. They belong in the next step's orders,
        since freed slots may be given to others in the same step."""
        return self._eviction.take_moves()

    # A checkpoint stays, or goes

    def keep(self, request_id: str, block_hashes: Sequence[Hashable]) -> int:
        """The request has ended, or a copy of one that has: whole blocks that are complete stay
        for whoever begins alike, the other slots go with the last pin. Returns the tokens."""
        entry = self.get(request_id)
        if entry is None:
            return 0
        num_blocks = min(entry.num_tokens // self.block_size, len(block_hashes))
        for index in range(num_blocks):
            self._publish(entry, index, block_hashes[index])
        if not entry.num_pins:
            for slot in entry.slots[num_blocks:]:
                self._table.disown(slot, online=entry.online)
            del entry.slots[num_blocks:]
            entry.num_tokens = num_blocks * self.block_size
            if not num_blocks:
                self.drop(request_id)
        return num_blocks * self.block_size

    def rate(self, request_id: str, worth: Worth) -> None:
        """The entry of that request, if it has one, is worth so much from here on."""
        if entry := self.get(request_id):
            entry.worth = worth

    def drop(self, request_id: str) -> None:
        """The request is done with it. Slots come back now, or with the last pin."""
        self._too_large.discard(request_id)
        entry = self._entries.get(request_id)
        if entry is None:
            return
        entry.leaving = True
        if not entry.num_pins:
            self._eviction.release(entry)

    def forget_all(self) -> None:
        """What every slot holds is worth nothing: nobody shares it from here on, not even while
        a copy of it is in flight."""
        self._table.unpublish_all()
        for request_id in list(self._entries):
            self.drop(request_id)

    def lose(self, slots: Iterable[int]) -> list[str]:
        """The bytes of these slots are no good (a copy failed, a checksum did not match):
        nobody may read them. A disk that failed gets no more. Returns the requests that lost
        their checkpoint."""
        bad = set(slots)
        self._eviction.disk_failed |= any(map(self.is_on_disk, bad))
        for slot in bad:
            self._table.unpublish(slot)
        losers = [n for n, e in self._entries.items() if not e.leaving and bad & {*e.slots}]
        self.counts["lost"] += len(losers)
        for request_id in losers:
            self.drop(request_id)
        return losers
