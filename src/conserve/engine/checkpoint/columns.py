"""The columns of checkpoints: which slots a request has in each KV group, and which it shares."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

from conserve.core.kv_groups import KVGroup
from conserve.engine.checkpoint.entry import Column, Entry, Held
from conserve.engine.checkpoint.slot_table import SlotTable

Rest = list[tuple[Column, list[int]]]
"""Last slots of some columns."""


class Columns:
    """Changes the columns of entries, and who owns the slots in them."""

    def __init__(self, table: SlotTable, groups: Sequence[KVGroup], hash_tokens: int) -> None:
        self._table, self._groups, self._hash_tokens = table, groups, hash_tokens

    # Blocks by their hash

    def _name(self, number: int, hashes: Sequence[Hashable], index: int) -> Hashable | None:
        """Of the block with that index in group `number`: a hash names all tokens up to its end, so
        that of the block's last one says it."""
        end = (index + 1) * self._groups[number].block_size
        last = end // self._hash_tokens - 1
        # Where hashes are further apart than blocks, few blocks end with one.
        is_named = end % self._hash_tokens == 0 and last < len(hashes)
        return (number, hashes[last]) if is_named else None

    def known(self, number: int, hashes: Sequence[Hashable], index: int) -> int | None:
        """The slot that holds that block, whoever computed it."""
        name = self._name(number, hashes, index)
        return None if name is None else self._table.slot_of.get(name)

    def num_leading(self, hashes: Sequence[Hashable]) -> int:
        """Leading tokens whose blocks are here, in all groups that keep all of them."""
        num_tokens = len(hashes) * self._hash_tokens
        for number, group in enumerate(self._groups):
            if group.keeps_all:
                indices = range(num_tokens // group.block_size)
                lacking = (i for i in indices if self.known(number, hashes, i) is None)
                num_tokens = next(lacking, len(indices)) * group.block_size
        return num_tokens

    def num_in_windows(
        self, hashes: Sequence[Hashable], num_tokens: int, most_tokens: float
    ) -> int:
        """`num_tokens` if the windows' blocks are here that restoring them takes, or `most_tokens`
        if that is less; else fewer, beyond which it is not worth looking."""
        for number, group in enumerate(self._groups):
            if group.keeps_all:
                continue
            first = group.first_needed(int(min(num_tokens, most_tokens)))
            indices = reversed(range(first, num_tokens // group.block_size))
            lacking = (i for i in indices if self.known(number, hashes, i) is None)
            if (index := next(lacking, None)) is not None:
                return self._before(number, hashes, index, most_tokens)
        return num_tokens

    def _before(
        self, number: int, hashes: Sequence[Hashable], index: int, most_tokens: float
    ) -> int:
        """Tokens before that block, which is not here, behind the next one that is, or where none
        is needed: however much of a prefix a window has left, each block is looked at once."""
        group = self._groups[number]
        size = group.block_size
        while (
            index > group.first_needed(int(min(index * size, most_tokens)))
            and self.known(number, hashes, index - 1) is None
        ):
            index -= 1
        return index * size

    # A checkpoint grows

    def begin(
        self, entry: Entry, num_tokens: int, hashes: Sequence[Hashable], held: Held | None
    ) -> bool:
        """Where a window has left blocks that a column lacks yet, begin that where the window needs
        it. False while copies are under way into or out of what would go."""
        for number, column in enumerate(entry.columns):
            if not column.group.has_window:
                continue
            here = 0.0 if held is None else held.first_blocks[number]
            first = self._first(number, column.group, num_tokens, hashes, here)
            copied = entry.num_tokens if held is None else held.num_copied
            if column.slots and first <= column.end and not self._lost(column, copied, here):
                continue
            if column.slots and entry.num_pins:
                return False
            self._disown(entry, column.slots)
            column.first, column.slots = first, []
        return True

    def _lost(self, column: Column, num_copied: int, here: float) -> bool:
        """Whether blocks behind those tokens are gone that its slots were meant for."""
        first = max(num_copied // column.group.block_size, column.first)
        gone = range(first, int(min(here, column.end)))
        return any(column.at(index) not in self._table.hash_of for index in gone)

    def _first(
        self,
        number: int,
        group: KVGroup,
        num_tokens: int,
        hashes: Sequence[Hashable],
        here: float,
    ) -> int:
        """The first block to keep of a window. Further back than it needs by one token, if that is
        on the host or, from `here` on, on the device: a request may be restored to a token less."""
        first = group.first_needed(num_tokens)
        if first < here < math.inf:
            first = int(here)
        least = group.first_needed(max(0, num_tokens - 1))
        while first > least and (first > here or self.known(number, hashes, first - 1) is not None):
            first -= 1
        return first

    def share(self, entry: Entry, num_tokens: int, hashes: Sequence[Hashable]) -> None:
        """Have what the pool has of them behind its complete tokens: in place of its own slots
        that are not complete, too, while no copy fills those."""
        for number, column in enumerate(entry.columns):
            size = column.group.block_size
            for index in range(max(entry.num_tokens // size, column.first), column.end):
                if self.known(number, hashes, index) is not None:
                    self._publish(entry, number, index, hashes)
            while column.num_lacking(num_tokens):
                slot = self.known(number, hashes, column.end)
                if slot is None:
                    break
                self._own(entry, column, slot)
        self.advance(entry, entry.num_tokens)

    def open_on_disk(self, entry: Entry) -> Rest:
        """Slots of each column from the one that is partly filled, if that lies on disk."""
        found: Rest = []
        for column in entry.columns:
            index = entry.num_tokens // column.group.block_size
            if column.first <= index < column.end and self._table.is_on_disk(column.at(index)):
                found.append((column, column.slots[index - column.first :]))
        return found

    def num_lacking(self, entry: Entry, num_tokens: int, rest: Rest) -> int:
        """Free slots that so many tokens take once `rest` is given back."""
        given = {id(column): len(slots) for column, slots in rest}
        return sum(
            max(0, c.num_wanted(num_tokens) - len(c.slots) + given.get(id(c), 0))
            for c in entry.columns
        )

    def begin_anew(self, entry: Entry, rest: Rest) -> None:
        """Copies write to memory alone: what those last slots held is copied again."""
        for column, slots in rest:
            del column.slots[len(column.slots) - len(slots) :]
            entry.num_tokens = min(entry.num_tokens, column.end * column.group.block_size)
            self._disown(entry, slots)

    def fill(self, entry: Entry, num_tokens: int) -> None:
        """Take free slots for what is lacking."""
        for column in entry.columns:
            for _ in range(column.num_lacking(num_tokens)):
                self._own(entry, column, self._table.free.pop())
        self.advance(entry, entry.num_tokens)

    # It becomes complete

    def publish(self, entry: Entry, start: int, stop: int, hashes: Sequence[Hashable]) -> None:
        """Blocks within tokens [start, stop) that have a hash are complete: to be shared."""
        for number, column in enumerate(entry.columns):
            size = column.group.block_size
            for index in range(max(start // size, column.first), min(stop // size, column.end)):
                if self._name(number, hashes, index) is not None:
                    self._publish(entry, number, index, hashes)

    def _publish(self, entry: Entry, number: int, index: int, hashes: Sequence[Hashable]) -> None:
        table, column = self._table, entry.columns[number]
        slot, name = column.at(index), self._name(number, hashes, index)
        known = table.slot_of.get(name)
        if known is None and slot not in table.hash_of:
            table.publish(slot, name)
        elif known is not None and known != slot and not entry.num_pins:
            table.own(known, online=entry.online)
            column.put(index, known)
            table.disown(slot, online=entry.online)

    def advance(self, entry: Entry, num_tokens: int) -> None:
        """Complete up to `num_tokens`, and through shared blocks right behind, in all groups."""
        entry.num_tokens = min(self._reach(column, num_tokens) for column in entry.columns)

    def _reach(self, column: Column, num_tokens: int) -> int:
        index = first = num_tokens // column.group.block_size
        if index < column.first:
            index = column.first
        while index < column.end and column.at(index) in self._table.hash_of:
            index += 1
        return num_tokens if index == first else index * column.group.block_size

    # It becomes shorter

    def trim(self, entry: Entry, block_size: int) -> None:
        """Give back what windows have left, but for what restoring the last whole blocks takes."""
        num_tokens = max(0, entry.num_tokens - entry.num_tokens % block_size - 1)
        for column in entry.columns:
            count = min(column.group.first_needed(num_tokens) - column.first, len(column.slots))
            if count > 0:
                self._disown(entry, column.slots[:count])
                del column.slots[:count]
                column.first += count

    def cut(self, entry: Entry, num_tokens: int) -> None:
        """Give back all behind so many tokens, whole blocks."""
        for column in entry.columns:
            keep = max(0, num_tokens // column.group.block_size - column.first)
            self._disown(entry, column.slots[keep:])
            del column.slots[keep:]
        entry.num_tokens = num_tokens

    def _own(self, entry: Entry, column: Column, slot: int) -> None:
        column.slots.append(slot)
        self._table.own(slot, online=entry.online)

    def _disown(self, entry: Entry, slots: Iterable[int]) -> None:
        for slot in slots:
            self._table.disown(slot, online=entry.online)
