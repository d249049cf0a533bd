"""KV in checkpoint slots on a CPU: both ends are the host's memory.

A slot mirrors one KV block of every layer, byte for byte and in the order of the KV cache's
memory, so that a full block is copied in long runs. A block that is partly filled is copied to
the token, or to the granule where the attention kernel weaves tokens together (packing.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch

from conserve.engine.checkpoint.disk import SlotFile
from conserve.engine.checkpoint.packing import Packing, Part, UnknownLayoutError, stack, whole
from conserve.engine.checkpoint.slots import FAULTS, HostSlots

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Element size -> a type of that size that numpy knows too."""

Range = tuple[int, int]
"""Tokens [start, stop) of a block."""


class _Sheet(NamedTuple):
    """Layers of one shape: their pages in the KV cache, or what mirrors them in slots."""

    pages: torch.Tensor
    parts: list[Part]


class SlotStore:
    """`num_slots` blocks in memory, and those behind them in `file`, if there is one.

    planes: every layer's KV, [num_blocks, heads, tokens, content], as vLLM registers it; or
    [num_blocks, pages, heads, tokens, content] where the kernel's blocks are smaller than the
    scheduler's. packing: where tokens lie in them; with `whole` blocks go whole, whatever part of
    them is asked for.

    Not thread-safe: one thread at a time calls `write`, `read` and `move`. vLLM makes its
    tensors in inference mode, where alone they may be written, so these three copy in it,
    whichever thread calls them. They raise for nothing, but return the slots that failed
    (see `HostSlots`); a block that a failed slot was read into holds anything.

    Raises UnknownLayoutError for KV that cannot be addressed by block, MemoryError where the
    memory cannot be had.
    """

    def __init__(
        self,
        planes: Sequence[torch.Tensor],
        num_slots: int,
        file: SlotFile | None = None,
        *,
        packing: Packing = whole,
        checksums: bool = False,
    ) -> None:
        self._all_pages, self._packing = stack(planes), packing
        self.page_size = self._all_pages[0].shape[3]
        self._pages_per_block = _pages_per_block(planes)
        self.block_size = self._pages_per_block * self.page_size
        slot_bytes = self.slot_bytes(planes)
        memory = _memory(num_slots * slot_bytes)
        self.slots = HostSlots(memory, slot_bytes, file, checksums=checksums)
        self._sheets = [_Sheet(pages, packing(pages)) for pages in self._all_pages]
        self._memory = self._mirror(memory)

    @property
    def tokens_apart(self) -> int | None:
        """Tokens of a block where parts of one are copied; None where blocks go whole."""
        return None if self._packing is whole else self.block_size

    @staticmethod
    def slot_bytes(planes: Sequence[torch.Tensor]) -> int:
        """Bytes of one slot on this rank."""
        return _pages_per_block(planes) * sum(_page_bytes(pages) for pages in stack(planes))

    # What a step asks for

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def write(
        self, block_ids: Sequence[int], slots: Sequence[int], ranges: Sequence[Range] | None = None
    ) -> set[int]:
        """Block -> slot, pairwise, every layer; whole, or those tokens of each. Returns the slots
        that failed."""
        return self._copy_all(block_ids, slots, ranges, outward=True)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def read(
        self, slots: Sequence[int], block_ids: Sequence[int], ranges: Sequence[Range] | None = None
    ) -> set[int]:
        """Slot -> block, likewise, after a look at the checksum of the slot's last write if they
        are kept. Returns the slots that failed."""
        return self._copy_all(block_ids, slots, ranges, outward=False)

    def move(self, moves: Iterable[tuple[int, int]]) -> set[int]:
        """(from slot, to slot), in order. Returns the `to` slots that failed."""
        return self.slots.move(moves)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Give the memory and the file back."""
        self._sheets, self._memory = [], []
        self.slots.close()

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
        if self._packing is whole:
            ranges = None
        for block_id, slot, tokens in zip(block_ids, slots, ranges or repeat(every)):  # noqa: B905
            try:
                if not outward and not self.slots.is_intact(slot):
                    failed.add(slot)
                    continue
                self._copy(block_id, slot, tokens, outward=outward)
                if outward:
                    self.slots.written(slot)
            except FAULTS as error:
                what = "copying KV to the host" if outward else "copying KV back"
                failed.add(self.slots.failed(slot, what, error))
        return failed

    def _copy(self, block_id: int, slot: int, tokens: Range, *, outward: bool) -> None:
        mirror, number = self._memory, slot
        if not outward and self.slots.is_on_disk(slot):
            mirror, number = self._mirror(self.slots.to_read(slot)), 0
        elif self.slots.is_on_disk(slot):
            raise LookupError(f"slot {slot} is on disk, which moves alone fill")
        for i in range(self._pages_per_block):
            start = max(tokens[0] - i * self.page_size, 0)
            stop = min(tokens[1] - i * self.page_size, self.page_size)
            if start < stop:
                block, page = (n * self._pages_per_block + i for n in (block_id, number))
                self._copy_page(block, mirror, page, start, stop, outward=outward)

    def _copy_page(
        self, block: int, mirror: list[_Sheet], page: int, start: int, stop: int, *, outward: bool
    ) -> None:
        """Tokens [start, stop) of one page: of all layers at once, in as few runs as there are."""
        is_whole = start == 0 and stop == self.page_size
        for sheet, twin in zip(self._sheets, mirror, strict=True):
            if is_whole:
                pairs = [(sheet.pages[block], twin.pages[page])]
            else:
                pairs = [
                    (there.of(block, start, stop), here.of(page, start, stop))
                    for there, here in zip(sheet.parts, twin.parts, strict=True)
                ]
            for there, here in pairs:
                _copy_elements(*((here, there) if outward else (there, here)))

    def _mirror(self, slot_bytes: torch.Tensor) -> list[_Sheet]:
        """Bytes of slots seen as pages in the shape and the memory order of the cache's, one view
        for each of `_all_pages`."""
        slots = slot_bytes.view(-1, self.slots.slot_bytes)
        mirrors, offset = [], 0
        for pages in self._all_pages:
            num_bytes = self._pages_per_block * _page_bytes(pages)
            part = slots[:, offset : offset + num_bytes].view(pages.dtype)
            offset += num_bytes
            twin = _in_order_of(pages, part.unflatten(1, (self._pages_per_block, -1)))
            mirrors.append(_Sheet(twin, self._packing(twin)))
        return mirrors


def _copy_elements(to: torch.Tensor, source: torch.Tensor) -> None:
    """torch's own copy would gather threads of its own and take the forward's cores."""
    bits = BITS[to.element_size()]
    np.copyto(to.view(bits).numpy(), source.view(bits).numpy())


def _memory(num_bytes: int) -> torch.Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.int8)
    except RuntimeError as error:
        raise MemoryError(f"--checkpoint-bytes: no {num_bytes} bytes of memory") from error


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
