"""Which slots of the host pool are free, who has the others, and what the complete ones hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable


class SlotTable:
    """Slots [0, num_slots) are host memory; the numbers after them are the lower tier, on disk."""

    def __init__(self, num_slots: int, num_disk_slots: int) -> None:
        self.num_slots, self.num_disk_slots = num_slots, num_disk_slots
        self.free = list(range(num_slots - 1, -1, -1))
        self.free_on_disk = list(range(num_slots + num_disk_slots - 1, num_slots - 1, -1))
        self.num_owners: dict[int, int] = {}
        """Used slots only: how many entries hold each."""
        self.slot_of: dict[Hashable, int] = {}
        self.hash_of: dict[int, Hashable] = {}
        """Slots that are complete and may be shared, both ways round."""
        self._num_online_owners: Counter[int] = Counter()
        """Of those owners, online requests; no count is 0."""

    def num_used_by(self, *, online: bool) -> int:
        """Used slots of both tiers that an online request has or shares, or those that none has."""
        num_online = len(self._num_online_owners)
        return num_online if online else len(self.num_owners) - num_online

    def is_on_disk(self, slot: int) -> bool:
        return slot >= self.num_slots

    # Owners

    def own(self, slot: int, *, online: bool) -> None:
        """One more entry holds the slot. It must be off the free lists."""
        self.num_owners[slot] = self.num_owners.get(slot, 0) + 1
        if online:
            self._num_online_owners[slot] += 1

    def disown(self, slot: int, *, online: bool) -> None:
        """An entry of that class lets go of it; with the last one it is free, and holds nothing."""
        if online:
            self._num_online_owners[slot] -= 1
            if not self._num_online_owners[slot]:
                del self._num_online_owners[slot]
        self.num_owners[slot] -= 1
        if not self.num_owners[slot]:
            del self.num_owners[slot]
            self.unpublish(slot)
            (self.free_on_disk if self.is_on_disk(slot) else self.free).append(slot)

    # Content

    def publish(self, slot: int, block_hash: Hashable) -> None:
        """The slot is complete, and whoever needs that block may share it."""
        self.slot_of[block_hash] = slot
        self.hash_of[slot] = block_hash

    def unpublish(self, slot: int) -> None:
        if slot in self.hash_of:
            del self.slot_of[self.hash_of.pop(slot)]

    def unpublish_all(self) -> None:
        """Nobody shares what is there."""
        self.slot_of.clear()
        self.hash_of.clear()

    def move(self, from_slot: int, to_slot: int) -> None:
        """Owners and content go to a slot that is off the free lists; `from_slot` is free."""
        self.num_owners[to_slot] = self.num_owners.pop(from_slot)
        if count := self._num_online_owners.pop(from_slot, 0):
            self._num_online_owners[to_slot] = count
        if from_slot in self.hash_of:
            self.publish(to_slot, self.hash_of.pop(from_slot))
        self.free.append(from_slot)
