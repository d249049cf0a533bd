"""What a worker's queue of copies hands out in one go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from conserve.engine.checkpoint.orders import Job


class Piece(NamedTuple):
    """Some blocks of a job."""

    job: Job
    start: int
    stop: int
    """Of the job's blocks."""
    after: Any = None
    """What the device must have passed before the job's blocks may be read or written."""

    @property
    def block_ids(self) -> list[int]:
        return self.job.block_ids[self.start : self.stop]

    @property
    def slots(self) -> list[int]:
        return self.job.slots[self.start : self.stop]

    @property
    def ranges(self) -> list[tuple[int, int]] | None:
        return self.job.ranges[self.start : self.stop] or None


class Batch(NamedTuple):
    """Pieces of jobs in one direction; it may be empty."""

    pieces: Sequence[Piece]

    @property
    def store(self) -> bool:
        return all(piece.job.store for piece in self.pieces)

    @property
    def block_ids(self) -> list[int]:
        return [block for piece in self.pieces for block in piece.block_ids]

    @property
    def slots(self) -> list[int]:
        return [slot for piece in self.pieces for slot in piece.slots]

    @property
    def afters(self) -> list[Any]:
        """Of all pieces, each once."""
        return list({id(p.after): p.after for p in self.pieces if p.after is not None}.values())


class Moves(NamedTuple):
    """Slots of one step to be moved, in order: (from slot, to slot)."""

    moves: list[tuple[int, int]]
