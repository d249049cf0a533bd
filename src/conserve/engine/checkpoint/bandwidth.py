"""How fast KV moves between device and host, and how much of it copies may use."""

from __future__ import annotations

import math

from conserve.core.checkpointing import COPY_SHARE, copy_budget

NEWEST_WEIGHT = 0.2
"""Of the newest restore, in the average of their speed."""


class Bandwidth:
    """Speeds of one rank, all ranks copying side by side.

    `bytes_per_s` is the budget that an operator has set; 0: COPY_SHARE of what the workers measure.
    Until they have, nothing is copied.
    """

    def __init__(self, token_bytes: float, bytes_per_s: float = 0.0) -> None:
        self.token_bytes = token_bytes
        """Of one rank."""
        self._budget_bytes_per_s = bytes_per_s
        self._store_bytes_per_s = self._load_bytes_per_s = bytes_per_s
        self._slowest_bytes_per_s = math.inf
        self._last_s: float | None = None

    @property
    def store_tokens_per_s(self) -> float:
        return self._store_bytes_per_s / self.token_bytes

    @property
    def load_tokens_per_s(self) -> float:
        return self._load_bytes_per_s / self.token_bytes

    def earned_tokens(self, now_s: float, num_queued_tokens: int) -> int:
        """Tokens that may be queued for the host now, beside those that are. Call once a step."""
        last_s, self._last_s = self._last_s, now_s
        if last_s is None:
            return 0
        rate = self._budget_bytes_per_s or COPY_SHARE * self._store_bytes_per_s
        return int(copy_budget(now_s - last_s, rate / self.token_bytes, num_queued_tokens))

    def measured(self, bytes_per_s: float) -> None:
        """What a rank found when it had made its pool. The slowest counts."""
        self._slowest_bytes_per_s = min(self._slowest_bytes_per_s, bytes_per_s)
        self._store_bytes_per_s = self._load_bytes_per_s = self._slowest_bytes_per_s

    def loaded(self, num_bytes: float, seconds: float) -> None:
        """A restore brought so many bytes to one rank."""
        if seconds <= 0 or not num_bytes:
            return
        speed, old = num_bytes / seconds, self._load_bytes_per_s
        self._load_bytes_per_s = old + NEWEST_WEIGHT * (speed - old) if old else speed
