"""Staging buffers on a device with streams: KV passes through them between blocks and slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from conserve.engine.checkpoint.device import Device, Event

NUM_BUFFERS = 5
"""Pieces under way at once: while one is copied, others are gathered and ordered."""
NUM_RESERVED = 2
"""Of them for what a forward waits for, so that it finds one free however busy the link is."""
BUFFER_BYTES = 32 << 20
"""Less than a millisecond of the link, and few enough pieces a second that ordering them costs
the host little."""


def staging_buffers(device: Device[Any], slot_bytes: int) -> list[torch.Tensor]:
    """Bytes, [blocks, slot_bytes] each. Raises RuntimeError where the device has no room."""
    num_bytes = max(1, BUFFER_BYTES // slot_bytes) * slot_bytes
    return [device.empty(num_bytes).view(-1, slot_bytes) for _ in range(NUM_BUFFERS)]


class Buffer:
    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        """Bytes, [blocks, slot_bytes], on the device."""
        self.done: Event | None = None
        """Of the last piece that used it."""

    @property
    def is_free(self) -> bool:
        return self.done is None or self.done.query()


class Staging:
    """Who gets which. Not thread-safe, but for `room`."""

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        """buffers: as `staging_buffers` makes them."""
        self.num_blocks = len(buffers[0])
        """In a buffer."""
        made = [Buffer(rows) for rows in buffers]
        self._reserved, self._others = deque(made[:NUM_RESERVED]), deque(made[NUM_RESERVED:])
        """Each with the one that was used longest ago first."""

    @property
    def has_room(self) -> bool:
        """For what no forward waits for."""
        return self._others[0].is_free

    def room(self) -> Event | None:
        """When passed, there is room; None: there is."""
        return self._others[0].done

    def take(self) -> Buffer:
        """For what no forward waits for."""
        return _next(self._others)

    def take_urgently(self) -> Buffer:
        """For what a forward waits for: one that is free, if any is."""
        lent = not self._reserved[0].is_free and self.has_room
        return _next(self._others if lent else self._reserved)

    def close(self) -> None:
        self._reserved.clear()
        self._others.clear()


def _next(buffers: deque[Buffer]) -> Buffer:
    buffers.rotate(-1)
    return buffers[-1]
