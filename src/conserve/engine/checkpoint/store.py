"""The bytes behind checkpoint slots, on one rank (worker process).

A slot mirrors one KV block of every layer, byte for byte and in the order of the device's
memory, so that a full block is copied in long runs. A block that is partly filled is copied to
the token, or to the granule where the attention kernel weaves tokens together (packing.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from conserve.engine.checkpoint import disk
from conserve.engine.checkpoint.packing import Packing, Part, UnknownLayoutError, stack, whole
from conserve.engine.door import get_accelerator_view_from_cpu_tensor, init_logger, pin_tensor

logger = init_logger("vllm.conserve")

FAULTS = (RuntimeError, LookupError, OSError)
"""What a copy may end with: the accelerator's errors, a slot or block that there is not, a disk."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Element size -> a type of that size that numpy knows too."""

Range = tuple[int, int]
"""Tokens [start, stop) of a block."""


class _Sheet(NamedTuple):
    """Layers of one shape: their pages on the device, and what mirrors them in each tier."""

    device: torch.Tensor
    device_parts: list[Part]
    tiers: list[tuple[torch.Tensor, list[Part]]]
    """Of the host and, if there is one, of the disk."""


class SlotStore:
    """One host array of `num_slots` blocks (pinned where the KV is on CUDA), and optionally a
    file of `num_disk_slots` blocks in `folder`, which ends with the process.

    planes: every layer's KV, [num_blocks, heads, tokens, content], as vLLM registers it; or
    [num_blocks, pages, heads, tokens, content] where the kernel's blocks are smaller than the
    scheduler's. packing: where tokens lie in them.

    Not thread-safe: one thread at a time calls `write`, `read` and `move`. On CUDA the caller
    has entered the stream that is to do the copies; they are only queued on it, except where a
    disk slot or a checksum is touched, which waits for the stream. On a CPU they have happened
    on return. A folder that cannot be used is one warning; there is no disk tier then.

    vLLM makes its tensors in inference mode, where alone they may be written, so these three
    copy in it, whichever thread calls them. None of them raises for a failed copy, a missing
    tier or a wrong checksum: they return the slots that failed, and log the first failure of
    each kind. A slot that failed holds nothing; a block it was read into holds anything.

    Raises UnknownLayoutError for KV that cannot be addressed by block, MemoryError where the
    host array cannot be had.
    """

    def __init__(
        self,
        planes: Sequence[torch.Tensor],
        num_slots: int,
        num_disk_slots: int = 0,
        folder: Path | None = None,
        *,
        packing: Packing = whole,
        checksums: bool = False,
    ) -> None:
        self.device_pages = stack(planes)
        first = self.device_pages[0]
        self.page_size = first.shape[3]
        self._pages_per_block = _pages_per_block(planes)
        self.block_size = self._pages_per_block * self.page_size
        self._slot_bytes = self.slot_bytes(planes)
        self.num_slots, self.num_disk_slots = num_slots, 0
        self._on_cuda = first.is_cuda
        self._checksums: dict[int, int] | None = {} if checksums else None
        self._said: set[str] = set()
        self._tiers = [self._host_array()]
        if num_disk_slots and folder is not None:
            self._add_disk(folder, num_disk_slots)
        near = [self._near(self._tiers[0]), *self._tiers[1:]]
        mirrors = [self._mirrors(tier) for tier in near]
        self._sheets = [
            _Sheet(pages, packing(pages), [(m[i], packing(m[i])) for m in mirrors])
            for i, pages in enumerate(self.device_pages)
        ]

    @staticmethod
    def slot_bytes(planes: Sequence[torch.Tensor]) -> int:
        """Bytes of one slot on this rank."""
        return _pages_per_block(planes) * sum(_page_bytes(pages) for pages in stack(planes))

    # What a step asks for

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def write(
        self, block_ids: Sequence[int], slots: Sequence[int], ranges: Sequence[Range] | None = None
    ) -> set[int]:
        """Device block -> slot, pairwise, every layer; whole, or those tokens of each. Returns
        the slots that failed."""
        return self._copy_all(block_ids, slots, ranges, outward=True)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def read(
        self, slots: Sequence[int], block_ids: Sequence[int], ranges: Sequence[Range] | None = None
    ) -> set[int]:
        """Slot -> device block, likewise, after a look at the checksum of the slot's last write
        if they are kept. Returns the slots that failed."""
        return self._copy_all(block_ids, slots, ranges, outward=False)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def move(self, moves: Iterable[tuple[int, int]]) -> set[int]:
        """(from slot, to slot), in order. Returns the `to` slots that failed."""
        failed = set()
        for from_slot, to_slot in moves:
            try:
                self._wait()
                self._bytes(to_slot).copy_(self._bytes(from_slot))
                if self._checksums is not None:
                    self._checksums[to_slot] = self._checksums.get(from_slot, 0)
            except FAULTS as error:
                failed.add(self._failed(to_slot, "moving a slot", error))
        return failed

    def close(self) -> None:
        """Give the memory and the file back."""
        if self._on_cuda and self._tiers:
            torch.cuda.cudart().cudaHostUnregister(self._tiers[0].data_ptr())
        self._sheets, self._tiers = [], []

    # One copy

    def _copy_all(
        self,
        block_ids: Sequence[int],
        slots: Sequence[int],
        ranges: Sequence[Range] | None,
        *,
        outward: bool,
    ) -> set[int]:
        failed: set[int] = set()
        every = (0, self.block_size)
        for block_id, slot, tokens in zip(block_ids, slots, ranges or repeat(every)):  # noqa: B905
            try:
                if not outward and not self._is_intact(slot):
                    failed.add(self._failed(slot, "checking a checkpoint", "another checksum"))
                    continue
                self._copy(block_id, slot, tokens, outward=outward)
                if outward and self._checksums is not None:
                    self._checksums[slot] = self._checksum(slot)
            except FAULTS as error:
                what = "copying KV to the host" if outward else "copying KV back"
                failed.add(self._failed(slot, what, error))
        return failed

    def _copy(self, block_id: int, slot: int, tokens: Range, *, outward: bool) -> None:
        tier, number = self._locate(slot)
        if tier and self._on_cuda:
            self._wait()
        for i in range(self._pages_per_block):
            start = max(tokens[0] - i * self.page_size, 0)
            stop = min(tokens[1] - i * self.page_size, self.page_size)
            if start < stop:
                block, page = (n * self._pages_per_block + i for n in (block_id, number))
                self._copy_page(block, tier, page, start, stop, outward=outward)

    def _copy_page(
        self, block: int, tier: int, page: int, start: int, stop: int, *, outward: bool
    ) -> None:
        """Tokens [start, stop) of one page: of all layers at once, in as few runs as there are."""
        is_whole = start == 0 and stop == self.page_size
        for sheet in self._sheets:
            host, host_parts = sheet.tiers[tier]
            if is_whole:
                pairs = [(sheet.device[block], host[page])]
            else:
                pairs = [
                    (there.of(block, start, stop), here.of(page, start, stop))
                    for there, here in zip(sheet.device_parts, host_parts, strict=True)
                ]
            for device, mirror in pairs:
                self._copy_elements(*((mirror, device) if outward else (device, mirror)))

    def _copy_elements(self, to: torch.Tensor, source: torch.Tensor) -> None:
        if self._on_cuda:
            to.copy_(source, non_blocking=True)
        else:
            # torch's own copy would gather threads of its own and take the forward's cores.
            bits = BITS[to.element_size()]
            np.copyto(to.view(bits).numpy(), source.view(bits).numpy())

    # Tiers

    def _locate(self, slot: int) -> tuple[int, int]:
        """(tier, number in it). Raises LookupError for a slot that there is not."""
        if 0 <= slot < self.num_slots:
            return 0, slot
        if self.num_slots <= slot < self.num_slots + self.num_disk_slots:
            return 1, slot - self.num_slots
        raise LookupError(f"there is no slot {slot}")

    def _bytes(self, slot: int) -> torch.Tensor:
        tier, number = self._locate(slot)
        return self._tiers[tier].narrow(0, number * self._slot_bytes, self._slot_bytes)

    def _host_array(self) -> torch.Tensor:
        num_bytes = self.num_slots * self._slot_bytes
        try:
            array = torch.empty(num_bytes, dtype=torch.int8)
        except RuntimeError as error:
            raise MemoryError(f"--checkpoint-bytes: no {num_bytes} bytes of memory") from error
        if self._on_cuda:
            pin_tensor(array)
        return array

    def _near(self, array: torch.Tensor) -> torch.Tensor:
        """The host array as the device reaches it: the copies then run on its streams, in any
        stride, without a detour through a buffer."""
        return get_accelerator_view_from_cpu_tensor(array) if self._on_cuda else array

    def _add_disk(self, folder: Path, num_disk_slots: int) -> None:
        try:
            self._tiers.append(disk.map_file(folder, num_disk_slots * self._slot_bytes))
        except OSError as error:
            logger.warning(
                "ConServe: --checkpoint-dir %s cannot hold %d bytes (%s): no checkpoints on disk",
                folder,
                num_disk_slots * self._slot_bytes,
                error.strerror or error,
            )
            return
        self.num_disk_slots = num_disk_slots

    def _mirrors(self, array: torch.Tensor) -> list[torch.Tensor]:
        """`array` seen as pages in the shape and the memory order of the device's, one view for
        each of `device_pages`."""
        slots = array.view(-1, self._slot_bytes)
        mirrors, offset = [], 0
        for pages in self.device_pages:
            num_bytes = self._pages_per_block * _page_bytes(pages)
            part = slots[:, offset : offset + num_bytes].view(pages.dtype)
            offset += num_bytes
            mirrors.append(_in_order_of(pages, part.unflatten(1, (self._pages_per_block, -1))))
        return mirrors

    # Faults

    def _is_intact(self, slot: int) -> bool:
        if self._checksums is None:
            return True
        return self._checksums.get(slot) == self._checksum(slot)

    def _checksum(self, slot: int) -> int:
        self._wait()
        return zlib.crc32(self._bytes(slot).numpy())

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.current_stream().synchronize()

    def _failed(self, slot: int, what: str, why: object) -> int:
        if self._checksums is not None:
            self._checksums.pop(slot, None)
        if what not in self._said:
            self._said.add(what)
            logger.warning("ConServe: %s failed, so it is recomputed: %s", what, why)
        return slot


def _pages_per_block(planes: Sequence[torch.Tensor]) -> int:
    return int(planes[0].shape[1]) if planes[0].dim() == 5 else 1


def _page_bytes(pages: torch.Tensor) -> int:
    return int(pages[0].numel() * pages.element_size())


def _in_order_of(pages: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """flat, [slots, pages per block, elements], as [pages, layers, heads, tokens, content] with
    the memory order of `pages`: the axis with the largest stride outermost."""
    axes: Sequence[int] = sorted(range(1, 5), key=lambda axis: -pages.stride(axis))
    sizes = [pages.shape[axis] for axis in axes]
    ordered = flat.unflatten(2, sizes)
    back = [2 + axes.index(axis) for axis in range(1, 5)]
    ordered = ordered.permute(0, 1, *back)
    return ordered.view(-1, *ordered.shape[2:]) if ordered.shape[1] == 1 else _joined(ordered)


def _joined(ordered: torch.Tensor) -> torch.Tensor:
    """[slots, pages per block, ...] as [pages, ...]: evenly spaced only if a slot has no other
    sheet's bytes between them. Raises UnknownLayoutError otherwise."""
    if ordered.stride(0) != ordered.shape[1] * ordered.stride(1):
        raise UnknownLayoutError("layers of several shapes, in blocks of several pages")
    shape = (ordered.shape[0] * ordered.shape[1], *ordered.shape[2:])
    return ordered.as_strided(shape, ordered.stride()[1:])
