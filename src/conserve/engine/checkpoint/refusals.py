"""Requests that the host pool has had no room for, so that it is not asked in every step."""

from __future__ import annotations

import math

RETRY_S = 1.0
"""After it the pool is asked again, though as much of it is used: by then others may be worth less,
or their copies over, and make room."""


class Refusals:
    """Each is good while the pool is as full as it was then, for RETRY_S at most."""

    def __init__(self) -> None:
        self._num_used: dict[str, int] = {}
        """request_id -> used slots when the pool had no room for it."""
        self._cleared_s = -math.inf

    def __len__(self) -> int:
        return len(self._num_used)

    def look(self, now_s: float) -> None:
        """Say how late it is. Call once a step."""
        if not 0 <= now_s - self._cleared_s < RETRY_S:
            self._cleared_s = now_s
            self.clear()

    def add(self, request_id: str, num_used_slots: int) -> None:
        self._num_used[request_id] = num_used_slots

    def holds(self, request_id: str, num_used_slots: int) -> bool:
        return self._num_used.get(request_id) == num_used_slots

    def forget(self, request_id: str) -> None:
        self._num_used.pop(request_id, None)

    def clear(self) -> None:
        self._num_used.clear()
