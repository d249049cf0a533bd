"""The checkpoint of one request, what it is worth beside others, and where its tokens go."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from conserve.core.kv_groups import KVGroup

WORTH_STEP = 1.25
"""Worths within this factor of each other count as equal, so that two requests that grow side
by side do not take each other's slots in turns."""


Rank = tuple[float, float]
"""Of checkpoints, the lowest goes first."""


@dataclass(frozen=True, slots=True)
class Worth:
    """What a checkpoint is good for."""

    saved_s: float
    """Predicted time to compute its tokens again."""
    deadline_s: float = math.inf
    """The request's own; the farther, the sooner it yields among equals."""


@dataclass(slots=True, eq=False)
class Column:
    """What a checkpoint has of one KV group: slots of blocks [first, end), by their index in the
    request. Of blocks before those, which the group's window has left, nothing is kept."""

    group: KVGroup
    first: int = 0
    slots: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.first + len(self.slots)

    def at(self, index: int) -> int:
        """The slot of that block; raises IndexError before the first and past the last one."""
        if index < self.first:
            raise IndexError(f"nothing is kept of block {index}")
        return self.slots[index - self.first]

    def put(self, index: int, slot: int) -> None:
        self.slots[index - self.first] = slot

    def num_wanted(self, num_tokens: int) -> int:
        """Slots that so many tokens take; none of recurrent layers, which keep no tokens."""
        if self.group.is_state:
            return 0
        return max(0, -(-num_tokens // self.group.block_size) - self.first)

    def num_lacking(self, num_tokens: int) -> int:
        """Slots to be added for them."""
        return max(0, self.num_wanted(num_tokens) - len(self.slots))


@dataclass(slots=True)
class State:
    """What a checkpoint has of recurrent layers: all of it is of one token, and of no use at any
    other."""

    slots: list[int] = field(default_factory=list)
    """One for each KV group of such layers."""
    num_tokens: int = 0
    """Leading tokens of the request that it has seen, once the copies under way are done; 0: it
    holds nothing."""


@dataclass(slots=True, eq=False)
class Entry:
    """The checkpoint of one request."""

    request_id: str
    worth: Worth
    online: bool = False
    columns: list[Column] = field(default_factory=list)
    """One for each KV group."""
    state: State | None = None
    """None of a model without recurrent layers."""
    num_tokens: int = 0
    """Leading tokens whose bytes are complete in the slots, as far as those reach back."""
    num_pins: int = 0
    """Copies in flight, in or out: while there are any, its slots stay where they are."""
    leaving: bool = False
    """Dropped; its slots are given back with the last pin."""

    @property
    def slots(self) -> list[int]:
        """Of all columns, and of the state."""
        own = self.state.slots if self.state else []
        return [*chain.from_iterable(column.slots for column in self.columns), *own]

    @property
    def num_slots(self) -> int:
        of_state = len(self.state.slots) if self.state else 0
        return sum(len(column.slots) for column in self.columns) + of_state

    def token_columns(self) -> Iterable[tuple[int, Column]]:
        """Columns of the KV groups that keep tokens, by the groups' numbers."""
        return [(n, c) for n, c in enumerate(self.columns) if not c.group.is_state]

    def end_within(self, num_tokens: int) -> int:
        """What a request may be restored to whose checkpoint has so many tokens: no further than
        recurrent layers have a state of."""
        return min(num_tokens, self.state.num_tokens) if self.state else num_tokens

    def reaches_back(self, num_tokens: int) -> bool:
        """Whether a request that is restored to so many tokens finds the windows of all groups, and
        the state of just those. To be restored it needs their bytes, too: those of `num_tokens` at
        most."""
        if self.state is not None and self.state.num_tokens != num_tokens:
            return False
        return all(c.first <= c.group.first_needed(num_tokens) for _, c in self.token_columns())

    def renumber(self, moved: Mapping[int, int]) -> None:
        """Some of its slots are others now."""
        for column in self.columns:
            column.slots = [moved.get(slot, slot) for slot in column.slots]
        if self.state is not None:
            self.state.slots = [moved.get(slot, slot) for slot in self.state.slots]

    def rank(self, num_slots: int | None = None) -> Rank:
        """The lowest goes first: recompute time saved a slot, then the farthest deadline."""
        saved_s = self.worth.saved_s / max(1, num_slots or self.num_slots)
        step = math.floor(math.log(saved_s, WORTH_STEP)) if saved_s > 0 else -math.inf
        return step, -self.worth.deadline_s


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of a request's block number `index` in a KV group, and the slot they
    belong in."""

    index: int
    slot: int
    start: int
    stop: int
    group: int = 0


class Held(NamedTuple):
    """What a request has on the device."""

    first_blocks: Sequence[float]
    """By KV group, the first block that it will hold still when copies begin."""
    num_copied: int
    """Leading tokens that need no copy: it is done, or under way."""

    @classmethod
    def of(cls, groups: Iterable[KVGroup], num_computed: int, num_copied: int) -> Held:
        """What windows have left is given to others while the engine schedules the step."""
        return cls([group.first_needed(num_computed) for group in groups], num_copied)


class Move(NamedTuple):
    """Copy one slot's bytes to another. Workers do a step's moves before its copies."""

    from_slot: int
    to_slot: int
