"""Copies in bulk between a staging buffer and slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from conserve.engine.checkpoint.slots import HostSlots


class Stretch(NamedTuple):
    """Slots that are copied as one."""

    first: int
    """Which of the slots that are copied comes first in it."""
    num_slots: int
    kept: torch.Tensor
    """Their bytes on the host."""


def stretches_of(slots: HostSlots, numbers: Sequence[int], *, outward: bool) -> list[Stretch]:
    """Those numbers, in as few stretches as they make up: to be written to, or to be read, which
    brings what is on disk into memory. Raises LookupError for a slot that there is not, and
    DiskError."""
    bytes_of = slots.bytes_of if outward else slots.to_read
    found = []
    key: Callable[[tuple[int, int]], object]
    key = lambda at: (at[1] - at[0], slots.section_of(at[1]))  # noqa: E731
    for _, run in groupby(enumerate(numbers), key):
        members = list(run)
        first, number = members[0]
        found.append(Stretch(first, len(members), bytes_of(number, len(members))))
    return found


def copying(
    rows: torch.Tensor, stretches: Sequence[Stretch], *, outward: bool
) -> Callable[[], None]:
    """The copy between a buffer and slots. rows: bytes, [blocks, slot_bytes]."""
    pairs = [(rows[one.first : one.first + one.num_slots].flatten(), one.kept) for one in stretches]

    def copy() -> None:
        for staged, kept in pairs:
            to, source = (kept, staged) if outward else (staged, kept)
            to.copy_(source, non_blocking=True)

    return copy
