"""The bytes behind slots, on one rank (worker process).

A slot holds the bytes of one whole KV block of every layer. Whole blocks, because some attention
backends pack the tokens of a block together (vLLM's CPU kernels store keys transposed), so that
no byte range belongs to one token; what lies behind the last valid token of a block is copied
along and never read.

`planes` are the KV caches as [num_blocks, ...] views, one a layer (`copier.planes_of` makes them
from what vLLM registers). Blocks of a plane may be strided.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class SlotStore:
    """One host array of `num_slots` blocks (pinned if the planes are on CUDA), and optionally a
    file of `num_disk_slots` blocks in `folder`, made at start and deleted with the process.

    Not thread-safe: one thread at a time calls `write`, `read` and `move` (the copier's own).
    On CUDA the caller has entered the side stream; the methods then only queue the copies on it,
    except where a disk slot is touched, which synchronises the stream first. On a CPU they have
    happened on return, without the GIL where torch releases it.

    None of the three raises for a bad disk, a failed copy or a wrong checksum: they return the
    slots that failed and log the first failure of each kind. A slot that failed holds nothing.

    Raises ValueError, naming the setting, if `folder` cannot be written or has too little room,
    and MemoryError if the array cannot be had: before the first request.
    """

    def __init__(
        self,
        planes: Sequence[Any],
        num_slots: int,
        num_disk_slots: int = 0,
        folder: Path | None = None,
        *,
        checksums: bool = False,
    ) -> None: ...

    @staticmethod
    def slot_bytes(planes: Sequence[Any]) -> int:
        """Bytes of one slot on this rank."""
        raise NotImplementedError

    def write(self, block_ids: Sequence[int], slots: Sequence[int]) -> set[int]:
        """Device block -> slot, pairwise, all layers. Returns the slots that failed."""
        raise NotImplementedError

    def read(self, slots: Sequence[int], block_ids: Sequence[int]) -> set[int]:
        """Slot -> device block, pairwise, all layers; verifies the checksum of the slot's last
        write if checksums are on. Returns the slots that failed (their blocks hold anything)."""
        raise NotImplementedError

    def move(self, moves: Sequence[tuple[int, int]]) -> set[int]:
        """(from slot, to slot) in order. Returns the `to` slots that failed."""
        raise NotImplementedError

    def close(self) -> None:
        """Unpin, unmap, delete the file."""
