"""The bytes behind checkpoint slots, on one rank: an array in the host's memory and, below it, a
file. Which KV lies in them and how is the business of whoever copies."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch

from conserve.engine.door import init_logger

logger = init_logger("vllm.conserve")

FAULTS = (RuntimeError, LookupError, OSError)
"""What a copy may end with: the accelerator's errors, a slot or block that there is not, a disk."""


class HostSlots:
    """Slots [0, num_slots) are in memory, the `num_disk_slots` behind them on disk.

    Not thread-safe. Nothing raises for a failed copy, a missing tier or a wrong checksum: the
    first failure of each kind is logged, and the slots that failed are named. A slot that failed
    holds nothing.
    """

    def __init__(
        self,
        memory: torch.Tensor,
        slot_bytes: int,
        file: torch.Tensor | None = None,
        *,
        slots_per_section: int = 0,
        checksums: bool = False,
    ) -> None:
        """memory, file: bytes, a whole number of slots each. The memory may have been pinned in
        sections of so many slots; no single copy may reach from one into the next."""
        self.slot_bytes = slot_bytes
        self._slots_per_section = slots_per_section
        self.tiers = [memory] if file is None else [memory, file]
        self.num_slots = len(memory) // slot_bytes
        self.num_disk_slots = 0 if file is None else len(file) // slot_bytes
        self._checksums: dict[int, int] | None = {} if checksums else None
        self._said: set[str] = set()

    def agree(self, num_slots: int) -> None:
        """The ranks have room for so many in memory, all together: those on disk are numbered
        from there. Call before any slot is used."""
        self.num_slots = min(num_slots, self.num_slots)

    def close(self) -> None:
        """Give the file back, and forget the memory."""
        self.tiers = []

    def locate(self, slot: int) -> tuple[int, int]:
        """(tier, number in it). Raises LookupError for a slot that there is not."""
        if 0 <= slot < self.num_slots:
            return 0, slot
        if self.num_slots <= slot < self.num_slots + self.num_disk_slots:
            return 1, slot - self.num_slots
        raise LookupError(f"there is no slot {slot}")

    def bytes_of(self, slot: int, num_slots: int = 1) -> torch.Tensor:
        """Of that slot, and of so many behind it that lie in the same tier."""
        tier, number = self.locate(slot)
        return self.tiers[tier].narrow(0, number * self.slot_bytes, num_slots * self.slot_bytes)

    def section_of(self, slot: int) -> tuple[int, int]:
        """Slots that follow each other may be copied as one where this is the same."""
        tier, number = self.locate(slot)
        return tier, number // self._slots_per_section if self._slots_per_section else 0

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def move(self, moves: Iterable[tuple[int, int]]) -> set[int]:
        """(from slot, to slot), in order; nothing else may be using them. Returns the `to` slots
        that failed."""
        failed = set()
        for from_slot, to_slot in moves:
            try:
                self.bytes_of(to_slot).copy_(self.bytes_of(from_slot))
                if self._checksums is not None:
                    self._checksums[to_slot] = self._checksums.get(from_slot, 0)
            except FAULTS as error:
                failed.add(self.failed(to_slot, "moving a slot", error))
        return failed

    # Faults

    @property
    def has_checksums(self) -> bool:
        return self._checksums is not None

    def written(self, slot: int) -> None:
        """Its bytes are whole, and are to be found as they are."""
        if self._checksums is not None:
            self._checksums[slot] = self._checksum(slot)

    def is_intact(self, slot: int) -> bool:
        """Whether its bytes are those of the last write, as far as that is looked after."""
        if self._checksums is None or self._checksums.get(slot) == self._checksum(slot):
            return True
        self.failed(slot, "checking a checkpoint", "another checksum")
        return False

    def _checksum(self, slot: int) -> int:
        return zlib.crc32(self.bytes_of(slot).numpy())

    def failed(self, slot: int, what: str, why: object) -> int:
        """Forget what it held; says so, once for each `what`."""
        if self._checksums is not None:
            self._checksums.pop(slot, None)
        if what not in self._said:
            self._said.add(what)
            logger.warning("ConServe: %s failed, so it is recomputed: %s", what, why)
        return slot
