"""The bytes behind checkpoint slots, on one rank: an array in the host's memory and, below it, a
file. Which KV lies in them and how is the business of whoever copies."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable

import torch

from conserve.engine.checkpoint.disk import SlotFile
from conserve.engine.door import init_logger

logger = init_logger("vllm.conserve")

FAULTS = (RuntimeError, LookupError, OSError)
"""What a copy may end with: the accelerator's errors, a slot or block that there is not, a disk."""


def pageable(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.int8)


class DiskError(OSError):
    """A slot could not be brought from the disk as it was."""

    def __init__(self, slot: int, why: object) -> None:
        super().__init__(f"slot {slot} on disk: {why}")
        self.slot = slot


class HostSlots:
    """Slots [0, num_slots) are in memory, the `num_disk_slots` behind them on disk: those are
    filled by moves alone, and copies of their bytes are what is read.

    Not thread-safe. Nothing raises for a failed move, a missing tier or a wrong checksum: the
    first failure of each kind is logged, and the slots that failed are named. A slot that failed
    holds nothing.
    """

    def __init__(
        self,
        memory: torch.Tensor,
        slot_bytes: int,
        file: SlotFile | None = None,
        *,
        slots_per_section: int = 0,
        checksums: bool = False,
        empty: Callable[[int], torch.Tensor] = pageable,
    ) -> None:
        """memory: bytes, a whole number of slots. It may have been pinned in sections of so many
        slots; no single copy may reach from one into the next. What is read from disk is read into
        what `empty` makes."""
        self.slot_bytes = slot_bytes
        self._slots_per_section = slots_per_section
        self.memory, self._file, self._empty = memory, file, empty
        self.num_slots = len(memory) // slot_bytes
        self.num_disk_slots = 0 if file is None else file.num_slots
        self.has_checksums = checksums
        """Of slots in memory. Those on disk always have theirs: what the kernel could not write
        out comes back as something else, and no call has failed."""
        self._checksums: dict[int, int] = {}
        self._said: set[str] = set()

    def agree(self, num_slots: int) -> None:
        """The ranks have room for so many in memory, all together: those on disk are numbered
        from there. Call before any slot is used."""
        self.num_slots = min(num_slots, self.num_slots)

    def close(self) -> None:
        """Give the file back, and forget the memory."""
        self.memory, self.num_slots, self.num_disk_slots = torch.empty(0), 0, 0
        if self._file is not None:
            self._file.close()

    def is_on_disk(self, slot: int) -> bool:
        """Raises LookupError for a slot that there is not."""
        if not 0 <= slot < self.num_slots + self.num_disk_slots:
            raise LookupError(f"there is no slot {slot}")
        return slot >= self.num_slots

    def bytes_of(self, slot: int, num_slots: int = 1) -> torch.Tensor:
        """Of that slot in memory, and of so many behind it: what is written there is kept."""
        if self.is_on_disk(slot):
            raise LookupError(f"slot {slot} is on disk")
        return self.memory.narrow(0, slot * self.slot_bytes, num_slots * self.slot_bytes)

    def to_read(self, slot: int, num_slots: int = 1) -> torch.Tensor:
        """The same of any slot, to be read only: of slots on disk a copy, whose checksums are
        right. Raises DiskError."""
        if not self.is_on_disk(slot):
            return self.bytes_of(slot, num_slots)
        found = self._empty(num_slots * self.slot_bytes)
        for number, part in enumerate(found.split(self.slot_bytes)):
            self._read(slot + number, part)
        return found

    def _read(self, slot: int, into: torch.Tensor) -> None:
        assert self._file is not None
        try:
            self._file.read(slot - self.num_slots, into)
        except OSError as error:
            raise DiskError(slot, error) from error
        if self._checksums.get(slot) != checksum(into):
            raise DiskError(slot, "another checksum")

    def section_of(self, slot: int) -> tuple[bool, int]:
        """Slots that follow each other may be copied as one where this is the same."""
        on_disk = self.is_on_disk(slot)
        return on_disk, slot // self._slots_per_section if self._slots_per_section else 0

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def move(self, moves: Iterable[tuple[int, int]]) -> set[int]:
        """(from slot, to slot), in order; nothing else may be using them. Returns the `to` slots
        that failed."""
        failed = set()
        for from_slot, to_slot in moves:
            try:
                self._move(from_slot, to_slot)
            except FAULTS as error:
                failed.add(self.failed(to_slot, "moving a slot", error))
        return failed

    def _move(self, from_slot: int, to_slot: int) -> None:
        found = self.to_read(from_slot)
        if self.is_on_disk(to_slot):
            assert self._file is not None
            self._file.write(to_slot - self.num_slots, found)
        else:
            self.bytes_of(to_slot).copy_(found)
        self._checksums[to_slot] = (
            self._checksums.get(from_slot, 0) if self.has_checksums else checksum(found)
        )

    # Faults

    def written(self, slot: int) -> None:
        """Its bytes are whole, and are to be found as they are."""
        if self.has_checksums:
            self._checksums[slot] = checksum(self.bytes_of(slot))

    def is_intact(self, slot: int) -> bool:
        """Whether its bytes are those of the last write, as far as that is looked after. Slots on
        disk are looked at as they are read."""
        if not self.has_checksums or self.is_on_disk(slot):
            return True
        if self._checksums.get(slot) == checksum(self.bytes_of(slot)):
            return True
        self.failed(slot, "checking a checkpoint", "another checksum")
        return False

    def failed(self, slot: int, what: str, why: object) -> int:
        """Forget what it held; says so, once for each `what`."""
        self._checksums.pop(slot, None)
        if what not in self._said:
            self._said.add(what)
            logger.warning("ConServe: %s failed, so it is recomputed: %s", what, why)
        return slot


def checksum(slot: torch.Tensor) -> int:
    return zlib.crc32(slot.numpy())
