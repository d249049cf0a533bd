"""Which entries of the host pool make room for a worthier one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from conserve.engine.checkpoint.entry import Entry, Rank
from conserve.engine.checkpoint.slot_table import SlotTable


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
