"""The checkpoint of one request, what it is worth beside others, and where its tokens go."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

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
class Entry:
    """The checkpoint of one request."""

    request_id: str
    worth: Worth
    online: bool = False
    slots: list[int] = field(default_factory=list)
    num_tokens: int = 0
    """Leading tokens whose bytes are complete in the slots."""
    num_pins: int = 0
    """Copies in flight, in or out: while there are any, its slots stay where they are."""
    leaving: bool = False
    """Dropped; its slots are given back with the last pin."""

    def rank(self, num_slots: int | None = None) -> Rank:
        """The lowest goes first: recompute time saved a slot, then the farthest deadline."""
        saved_s = self.worth.saved_s / max(1, num_slots or len(self.slots))
        step = math.floor(math.log(saved_s, WORTH_STEP)) if saved_s > 0 else -math.inf
        return step, -self.worth.deadline_s


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of a request's block number `index`, and the slot they belong in."""

    index: int
    slot: int
    start: int
    stop: int


class Move(NamedTuple):
    """Copy one slot's bytes to another. Workers do a step's moves before its copies."""

    from_slot: int
    to_slot: int
