"""Who owns which checkpoint slot. Lives in the scheduler's process and touches no bytes.

A slot holds one block's worth of KV of every layer, on each rank under the same number. Slots
[0, num_slots) are host memory; the numbers after them are the lower tier, on disk.

    tokens of a request   [0 ........................... num_tokens) [num_tokens ... reserved)
    its slots             | slots[0] | slots[1] | ... | slots[i] partly |
                          complete, readable                          being written, or empty
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from conserve.engine.checkpoint.entry import Entry, Move, Span, Worth

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
        self._free = list(range(num_slots - 1, -1, -1))
        self._free_on_disk = list(range(num_slots + num_disk_slots - 1, num_slots - 1, -1))
        self._num_owners: dict[int, int] = {}
        """Used slots only: how many entries hold each."""
        self._slot_of: dict[Hashable, int] = {}
        self._hash_of: dict[int, Hashable] = {}
        """Slots that are complete and may be shared, both ways round."""
        self._moves: list[Move] = []
        self._too_large: set[str] = set()
        self._disk_failed = False

    # What is there

    @property
    def num_used_slots(self) -> int:
        return self.num_slots - len(self._free)

    @property
    def num_used_disk_slots(self) -> int:
        return self.num_disk_slots - len(self._free_on_disk)

    def get(self, request_id: str) -> Entry | None:
        """The entry as it stands; changed by this class only."""
        entry = self._entries.get(request_id)
        return None if entry is None or entry.leaving else entry

    def num_covered_tokens(self, request_id: str) -> int:
        entry = self.get(request_id)
        return entry.num_tokens if entry else 0

    def is_on_disk(self, slot: int) -> bool:
        return slot >= self.num_slots

    def spans(self, request_id: str, start: int, stop: int) -> list[Span]:
        """Tokens [start, stop), block by block, without blocks that somebody else's copy
        completed already. Raises KeyError without an entry, IndexError past its slots."""
        slots, size = self._entries[request_id].slots, self.block_size
        found = []
        for index in range(start // size, -(-stop // size)):
            first = index * size
            if slots[index] not in self._hash_of:
                low, high = max(start - first, 0), min(stop - first, size)
                found.append(Span(index, slots[index], low, high))
        return found

    # A request's checkpoint grows

    def grow(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[Hashable], worth: Worth
    ) -> bool:
        """Have slots for the leading `num_tokens` tokens; block_hashes[i] names full block i.

        Full blocks that are in the pool already are shared and count as complete. A partly filled
        block on disk is begun anew in memory: `num_tokens` of the entry goes back to its start.
        Where slots lack, entries of lower rank are demoted or evicted, whole. False if that would
        not do: nobody is evicted then, and what the request has stays.
        """
        entry = self._entries.setdefault(request_id, Entry(request_id, worth))
        if entry.leaving:
            return False
        entry.worth = worth
        wanted = -(-num_tokens // self.block_size)
        if wanted > self.num_slots:
            if request_id not in self._too_large:
                self._too_large.add(request_id)
                self.counts["refused_too_large"] += 1
            return self._refuse(entry)
        while len(entry.slots) < wanted and (slot := self._shared(entry, block_hashes)) is not None:
            self._own(entry, slot)
        self._advance(entry, entry.num_tokens)
        on_disk = self._open_on_disk(entry) if num_tokens > entry.num_tokens else []
        lacking = wanted - len(entry.slots) + len(on_disk)
        stays = bool(on_disk and entry.num_pins)
        if stays or not (lacking <= len(self._free) or self._make_room(lacking, entry, wanted)):
            return self._refuse(entry)
        self._begin_anew(entry, on_disk)
        for _ in range(lacking):
            self._own(entry, self._free.pop())
        self._advance(entry, entry.num_tokens)
        return True

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
            self._disown(slot)

    def _refuse(self, entry: Entry) -> bool:
        if not entry.slots and not entry.num_pins:
            del self._entries[entry.request_id]
        else:
            self._advance(entry, entry.num_tokens)
        return False

    def _shared(self, entry: Entry, block_hashes: Sequence[Hashable]) -> int | None:
        index = len(entry.slots)
        return self._slot_of.get(block_hashes[index]) if index < len(block_hashes) else None

    def _own(self, entry: Entry, slot: int) -> None:
        entry.slots.append(slot)
        self._num_owners[slot] = self._num_owners.get(slot, 0) + 1

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
        slot, known = entry.slots[index], self._slot_of.get(block_hash)
        if known is None and slot not in self._hash_of:
            self._slot_of[block_hash] = slot
            self._hash_of[slot] = block_hash
        elif known is not None and known != slot and not entry.num_pins:
            self._num_owners[known] += 1
            entry.slots[index] = known
            self._disown(slot)

    def _advance(self, entry: Entry, num_tokens: int) -> None:
        """Complete up to `num_tokens`, and through the shared blocks right behind."""
        index = num_tokens // self.block_size
        while index < len(entry.slots) and entry.slots[index] in self._hash_of:
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
            self._release(entry)

    def take_moves(self) -> list[Move]:
        """Moves decided since the last call, in order. They belong in the next step's orders,
        since freed slots may be given to others in the same step."""
        moves, self._moves = self._moves, []
        return moves

    # A checkpoint goes

    def drop(self, request_id: str) -> None:
        """The request is done with it. Slots come back now, or with the last pin."""
        self._too_large.discard(request_id)
        entry = self._entries.get(request_id)
        if entry is None:
            return
        entry.leaving = True
        if not entry.num_pins:
            self._release(entry)

    def forget_all(self) -> None:
        """What every slot holds is worth nothing: nobody shares it from here on, not even while
        a copy of it is in flight."""
        self._slot_of.clear()
        self._hash_of.clear()
        for request_id in list(self._entries):
            self.drop(request_id)

    def lose(self, slots: Iterable[int]) -> list[str]:
        """The bytes of these slots are no good (a copy failed, a checksum did not match):
        nobody may read them. A disk that failed gets no more. Returns the requests that lost
        their checkpoint."""
        bad = set(slots)
        self._disk_failed |= any(map(self.is_on_disk, bad))
        for slot in bad:
            self._unpublish(slot)
        losers = [n for n, e in self._entries.items() if not e.leaving and bad & {*e.slots}]
        self.counts["lost"] += len(losers)
        for request_id in losers:
            self.drop(request_id)
        return losers

    def _release(self, entry: Entry) -> None:
        del self._entries[entry.request_id]
        for slot in entry.slots:
            self._disown(slot)

    def _disown(self, slot: int) -> None:
        self._num_owners[slot] -= 1
        if not self._num_owners[slot]:
            del self._num_owners[slot]
            self._unpublish(slot)
            (self._free_on_disk if self.is_on_disk(slot) else self._free).append(slot)

    def _unpublish(self, slot: int) -> None:
        if slot in self._hash_of:
            del self._slot_of[self._hash_of.pop(slot)]

    # Room for others

    def _make_room(self, num_free: int, entry: Entry, num_slots: int) -> bool:
        victims = self._victims(num_free - len(self._free), entry, num_slots, on_disk=False)
        if not victims:
            return False
        self._send_down(victims)
        return True

    def _victims(self, lacking: int, entry: Entry, num_slots: int, *, on_disk: bool) -> list[Entry]:
        """Entries below `entry`'s rank, lowest first, whose going frees `lacking` slots of that
        tier; none if all of them together would not do."""
        rank = entry.rank(num_slots)
        below = [e for e in self._entries.values() if not e.num_pins and e.rank() < rank]
        chosen: list[Entry] = []
        seen: Counter[int] = Counter()
        for victim in sorted(below, key=lambda e: (*e.rank(), e.request_id)):
            if lacking <= 0:
                break
            mine = [s for s in victim.slots if self.is_on_disk(s) == on_disk]
            if victim is entry or not mine:
                continue
            chosen.append(victim)
            seen.update(mine)
            lacking -= sum(seen[slot] == self._num_owners[slot] for slot in mine)
        return chosen if lacking <= 0 else []

    def _send_down(self, victims: list[Entry]) -> None:
        """To the disk, the worthiest first, as far as there is room; the others are evicted."""
        held = Counter(slot for victim in victims for slot in victim.slots)
        leaving = {s for s, n in held.items() if n == self._num_owners[s] and s < self.num_slots}
        moved: dict[int, int] = {}
        evicted = []
        for victim in reversed(victims):
            mine = [slot for slot in victim.slots if slot in leaving and slot not in moved]
            if self._room_on_disk(len(mine), victim, victims):
                moved.update((slot, self._free_on_disk.pop()) for slot in mine)
            else:
                evicted.append(victim)
        for from_slot, to_slot in moved.items():
            self._move(from_slot, to_slot)
        for victim in victims:
            victim.slots = [moved.get(slot, slot) for slot in victim.slots]
        for victim in evicted:
            self._release(victim)
        self.counts["evicted"] += len(evicted)
        self.counts["demoted"] += len(victims) - len(evicted)

    def _room_on_disk(self, num_free: int, entry: Entry, spared: list[Entry]) -> bool:
        lacking = num_free - len(self._free_on_disk)
        if lacking <= 0:
            return self.num_disk_slots > 0 and not self._disk_failed
        victims = self._victims(lacking, entry, len(entry.slots), on_disk=True)
        if self._disk_failed or not victims or any(victim in spared for victim in victims):
            return False
        for victim in victims:
            self._release(victim)
        self.counts["evicted"] += len(victims)
        return True

    def _move(self, from_slot: int, to_slot: int) -> None:
        self._moves.append(Move(from_slot, to_slot))
        self._num_owners[to_slot] = self._num_owners.pop(from_slot)
        if from_slot in self._hash_of:
            block_hash = self._hash_of.pop(from_slot)
            self._hash_of[to_slot] = block_hash
            self._slot_of[block_hash] = to_slot
        self._free.append(from_slot)
