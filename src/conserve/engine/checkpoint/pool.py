"""Who owns which checkpoint slot. Lives in the scheduler's process and touches no bytes.

A slot holds one KV block, on each rank under the same number: with one KV group of all layers,
with several of the layers of one group. A request's checkpoint has a column of slots for each.

    tokens of a request   [0 ........................... num_tokens) [num_tokens ... reserved)
    slots of a column     | slots[0] | slots[1] | ... | slots[i] partly |
                          complete, readable                          being written, or empty
    of a window's column                | slots[0] | ... as much as the window needs
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from conserve.core.kv_groups import KVGroup, tokens_of_a_block
from conserve.engine.checkpoint.columns import Columns
from conserve.engine.checkpoint.entry import Column, Entry, Held, Move, Span, Worth
from conserve.engine.checkpoint.eviction import Eviction
from conserve.engine.checkpoint.slot_table import SlotTable
from conserve.engine.checkpoint.states import States

__all__ = ["Entry", "Held", "HostPool", "Move", "Span", "Worth"]


class HostPool:
    """Bounded slots. Full blocks are shared by hash, so a common prefix is held once.

    counts: refused_too_large (requests that the whole host tier could not hold), evicted,
    demoted, lost (requests); the reader may clear it.
    """

    def __init__(
        self,
        num_slots: int,
        block_size: int,
        num_disk_slots: int = 0,
        *,
        groups: Sequence[KVGroup] = (),
        hash_tokens: int = 0,
    ) -> None:
        """`block_size`: tokens that are whole blocks in every group; without `groups` there is one,
        of all layers and tokens. `hash_tokens`: those that a request has a hash for each of."""
        self.block_size = block_size
        self.num_slots = num_slots
        self.num_disk_slots = num_disk_slots
        self.groups = tuple(groups) or (KVGroup(block_size),)
        self.hash_tokens = hash_tokens or block_size
        self.windows = {n for n, group in enumerate(self.groups) if group.has_window}
        """Groups whose blocks a running request gives back."""
        self.counts: Counter[str] = Counter()
        self._entries: dict[str, Entry] = {}
        self._table = SlotTable(num_slots, num_disk_slots)
        self._columns = Columns(self._table, self.groups, self.hash_tokens)
        self.states = States(self._entries, self._table, self.groups)
        self.slot_tokens = tokens_of_a_block(self.groups)
        """Tokens whose KV, of all groups, is as large as a slot."""
        self.state_tokens = len(self.states) * self.slot_tokens
        """Those whose KV is as large as a request's recurrent state."""
        self._eviction = Eviction(self._entries, self._table, self.counts)
        self._too_large: set[str] = set()

    def of_size(self, num_slots: int) -> HostPool:
        """An empty one of this kind."""
        return HostPool(
            num_slots,
            self.block_size,
            self.num_disk_slots,
            groups=self.groups,
            hash_tokens=self.hash_tokens,
        )

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

    def num_restorable_tokens(self, request_id: str, num_tokens: int) -> int:
        """What a checkpoint, once it has so many tokens, brings a request back to: all of them, or
        the one that recurrent layers have a state of. 0 if it does not: of a window that copies
        lagged behind by, some is missing."""
        entry = self.get(request_id)
        end = entry.end_within(num_tokens) if entry else 0
        return end if entry and entry.reaches_back(end) else 0

    def num_shared_tokens(
        self, block_hashes: Sequence[Hashable], most_tokens: float = math.inf
    ) -> int:
        """Leading tokens of whoever has these full blocks that are complete in the pool, whole
        blocks in all groups. Of those, `most_tokens` may be restored, or fewer."""
        num_tokens = self._columns.num_leading(block_hashes)
        while True:
            num_tokens -= num_tokens % self.block_size
            held = self._columns.num_in_windows(block_hashes, num_tokens, most_tokens)
            if held >= num_tokens:
                return num_tokens
            num_tokens = held

    def shares_up_to(self, block_hashes: Sequence[Hashable], num_tokens: int) -> bool:
        """Whether the blocks are in the pool that end with that token, in all groups."""
        return all(
            self._columns.known(number, block_hashes, num_tokens // group.block_size - 1)
            is not None
            for number, group in enumerate(self.groups)
        )

    def is_on_disk(self, slot: int) -> bool:
        return self._table.is_on_disk(slot)

    def spans(self, request_id: str, start: int, stop: int) -> list[Span]:
        """Tokens [start, stop), block by block, without blocks that somebody else's copy
        completed already. Raises KeyError without an entry, IndexError past its slots."""
        found = []
        for number, column in self._entries[request_id].token_columns():
            size = column.group.block_size
            for index in range(max(start // size, column.first), -(-stop // size)):
                first, slot = index * size, column.at(index)
                if slot not in self._table.hash_of:
                    low, high = max(start - first, 0), min(stop - first, size)
                    found.append(Span(index, slot, low, high, number))
        return found

    def places(self, request_id: str, start: int, stop: int) -> list[Span]:
        """Slots to bring tokens [start, stop) back from, where a request needs them that goes on
        from `stop`; all of its state, whatever `start` is. Raises as `spans` does."""
        entry = self._entries[request_id]
        found = self.states.places(entry, stop)
        for number, column in entry.token_columns():
            size = column.group.block_size
            first = max(start // size, column.group.first_needed(stop))
            indices = range(first, -(-stop // size))
            found += [Span(index, column.at(index), 0, size, number) for index in indices]
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
        held: Held | None = None,
    ) -> bool:
        """Have slots for the leading `num_tokens` tokens; the hashes name full blocks.

        Full blocks that are in the pool already are shared and count as complete. A partly filled
        block on disk is begun anew in memory: `num_tokens` of the entry goes back to its start.
        Where slots lack, entries of lower rank are demoted or evicted, whole. False if that would
        not do: nobody is evicted then, and what the request has stays. Without `held` the request
        holds all of its blocks.
        """
        entry = self._entries.setdefault(request_id, Entry(request_id, worth, online))
        entry.columns = entry.columns or [Column(group) for group in self.groups]
        self.states.begin(entry)
        if entry.leaving:
            return False
        entry.worth = worth
        if not self._columns.begin(entry, num_tokens, block_hashes, held):
            return self._refuse(entry)
        wanted = sum(column.num_wanted(num_tokens) for column in entry.columns) + len(self.states)
        if wanted > self.num_slots:
            if request_id not in self._too_large:
                self._too_large.add(request_id)
                self.counts["refused_too_large"] += 1
            return self._refuse(entry)
        self._columns.share(entry, num_tokens, block_hashes)
        on_disk = self._columns.open_on_disk(entry) if num_tokens > entry.num_tokens else []
        lacking = self._columns.num_lacking(entry, num_tokens, on_disk)
        lacking += self.states.num_lacking(entry)
        moved = bool(on_disk) or self.states.is_on_disk(entry)
        stays, free = bool(moved and entry.num_pins), self._table.free
        if stays or not (lacking <= len(free) or self._eviction.make_room(lacking, entry, wanted)):
            return self._refuse(entry)
        self._columns.begin_anew(entry, on_disk)
        self._columns.fill(entry, num_tokens)
        self.states.fill(entry)
        return True

    def _refuse(self, entry: Entry) -> bool:
        if not entry.num_slots and not entry.num_pins:
            del self._entries[entry.request_id]
        else:
            self._columns.advance(entry, entry.num_tokens)
        return False

    def adopt(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[Hashable], worth: Worth
    ) -> None:
        """An online request that holds no blocks is to be restored to so many tokens: it has what
        others left of them."""
        end = -(-num_tokens // self.block_size) * self.block_size // self.hash_tokens
        shared = self.num_shared_tokens(block_hashes[:end], num_tokens)
        if shared > self.num_covered_tokens(request_id):
            held = Held([math.inf] * len(self.groups), 0)
            self.grow(request_id, shared, block_hashes, worth, online=True, held=held)

    def written(self, request_id: str, num_tokens: int, block_hashes: Sequence[Hashable]) -> None:
        """The bytes of the leading `num_tokens` tokens are in the slots, on every rank. Blocks
        that this completes are shared from here on; one that is in the pool twice is merged. What
        windows have left is given back."""
        entry = self.get(request_id)
        if entry is None or num_tokens <= entry.num_tokens:
            return
        self._columns.publish(entry, entry.num_tokens, num_tokens, block_hashes)
        self._columns.advance(entry, num_tokens)
        if not entry.num_pins:
            self._columns.trim(entry, self.block_size)

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
        self._too_large.discard(request_id)
        entry = self.get(request_id)
        if entry is None:
            return 0
        num_tokens = min(entry.num_tokens, len(block_hashes) * self.hash_tokens)
        num_tokens -= num_tokens % self.block_size
        self._columns.publish(entry, 0, num_tokens, block_hashes)
        if not entry.num_pins:
            self._columns.cut(entry, num_tokens)
            if not num_tokens or not entry.reaches_back(num_tokens):
                self.drop(request_id)
        return num_tokens

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

    def drop_if_short(self, request_id: str, num_tokens: int) -> None:
        """The request has lost its blocks, and the host has so many of its tokens: worth nothing
        where they do not reach back as far as a window does, or recurrent layers have no state."""
        entry = self.get(request_id)
        if entry is not None and not entry.reaches_back(entry.end_within(num_tokens)):
            self.drop(request_id)

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
