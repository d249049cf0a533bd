"""Room in the host pool: whose checkpoints go down to the disk, or go, for a worthier one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from conserve.engine.checkpoint.entry import Entry, Move, Rank
from conserve.engine.checkpoint.slot_table import SlotTable


class Eviction:
    """Takes entries out of the pool, whole, and counts them there: evicted, demoted."""

    def __init__(self, entries: dict[str, Entry], table: SlotTable, counts: Counter[str]) -> None:
        self._entries, self._table, self._counts = entries, table, counts
        self._moves: list[Move] = []
        self.disk_failed = False
        """Whether the disk gets no more."""

    def take_moves(self) -> list[Move]:
        """Moves decided since the last call, in order."""
        moves, self._moves = self._moves, []
        return moves

    def release(self, entry: Entry) -> None:
        del self._entries[entry.request_id]
        for slot in entry.slots:
            self._table.disown(slot, online=entry.online)

    def make_room(self, num_free: int, grower: Entry, num_slots: int) -> bool:
        """Have `num_free` free slots in memory for an entry that is to have `num_slots` in all.
        False if entries below its rank would not do; then all stay."""
        lacking, rank = num_free - len(self._table.free), grower.rank(num_slots)
        victims = self._victims(lacking, rank, {grower}, on_disk=False)
        if not victims:
            return False
        self._send_down(victims, grower)
        return True

    def _victims(
        self, lacking: int, rank: Rank, spared: set[Entry], *, on_disk: bool
    ) -> list[Entry]:
        others = [e for e in self._entries.values() if e not in spared and not e.num_pins]
        return choose_victims(others, rank, lacking, self._table, on_disk=on_disk)

    def _send_down(self, victims: list[Entry], grower: Entry) -> None:
        """To the disk, the worthiest first, as far as there is room; the others are evicted.
        `grower`, whom they make room for, may have slots on disk itself: they stay."""
        table = self._table
        held = Counter(slot for victim in victims for slot in victim.slots)
        owners = table.num_owners
        leaving = {s for s, n in held.items() if n == owners[s] and not table.is_on_disk(s)}
        moved: dict[int, int] = {}
        evicted, spared = [], {grower, *victims}
        for victim in reversed(victims):
            mine = [slot for slot in victim.slots if slot in leaving and slot not in moved]
            if self._room_on_disk(len(mine), victim, spared):
                moved.update((slot, table.free_on_disk.pop()) for slot in mine)
            else:
                evicted.append(victim)
        for from_slot, to_slot in moved.items():
            self._moves.append(Move(from_slot, to_slot))
            table.move(from_slot, to_slot)
        for victim in victims:
            victim.renumber(moved)
        for victim in evicted:
            self.release(victim)
        self._counts["evicted"] += len(evicted)
        self._counts["demoted"] += len(victims) - len(evicted)

    def _room_on_disk(self, num_free: int, entry: Entry, spared: set[Entry]) -> bool:
        if self.disk_failed or not self._table.num_disk_slots:
            return False
        lacking = num_free - len(self._table.free_on_disk)
        if lacking <= 0:
            return True
        victims = self._victims(lacking, entry.rank(), spared, on_disk=True)
        for victim in victims:
            self.release(victim)
        self._counts["evicted"] += len(victims)
        return bool(victims)


def choose_victims(
    entries: Iterable[Entry],
    rank: Rank,
    lacking: int,
    table: SlotTable,
    *,
    on_disk: bool,
) -> list[Entry]:
    """Those below `rank`, lowest first, whose going frees `lacking` slots of that tier; none if
    all of them together would not do. Slots that others share are not freed."""
    ranked = [(entry.rank(), entry.request_id, entry) for entry in entries]
    chosen: list[Entry] = []
    seen: Counter[int] = Counter()
    for _, _, victim in sorted(one for one in ranked if one[0] < rank):
        if lacking <= 0:
            break
        mine = [slot for slot in victim.slots if table.is_on_disk(slot) == on_disk]
        if not mine:
            continue
        chosen.append(victim)
        seen.update(mine)
        lacking -= sum(seen[slot] == table.num_owners[slot] for slot in mine)
    return chosen if lacking <= 0 else []
