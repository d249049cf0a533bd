"""What happens when: one queue, and one declared order for events of the same instant."""

from __future__ import annotations

from enum import IntEnum
from heapq import heappop, heappush
from typing import Any


class EventKind(IntEnum):
    """The order of events at equal times, first to last; within a kind, first pushed first.

    A step that ends frees its blocks before anybody asks for them, arrivals of that
    instant are known to the decision of that instant, and to whoever judges whether the
    running step is to stop; a decision is the last thing that happens in it.
    """

    STEP_END = 0
    RESTORED = 1
    ARRIVAL = 2
    JUDGE = 3
    SCHEDULE = 4


Event = tuple[float, EventKind, Any]


class EventQueue:
    """A heap of (time, kind, order of pushing)."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, EventKind, Any]] = []
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, time_s: float, kind: EventKind, payload: Any = None) -> None:
        self._num_pushed += 1
        heappush(self._heap, (time_s, int(kind), self._num_pushed, kind, payload))

    def pop(self) -> Event:
        """The next event. Raises IndexError when there is none."""
        time_s, _, _, kind, payload = heappop(self._heap)
        return time_s, kind, payload

    @property
    def next_s(self) -> float:
        """Time of the next event; infinity when there is none."""
        return self._heap[0][0] if self._heap else float("inf")
