"""Blocks of all layers, gathered from the device's memory into one stretch and scattered back.

Wherever vLLM puts layers, blocks and heads, one block is a number of equally long runs of bytes,
a *row* each. Which rows is a matter of arithmetic, done on the device: the host hands over block
ids, and its work grows neither with layers nor with heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from conserve.engine.checkpoint.packing import UnknownLayoutError

WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)
"""What bytes are copied as, the widest first that fits."""


@dataclass(frozen=True)
class _Memory:
    """Layers in one allocation, which is seen as rows."""

    rows: torch.Tensor
    """[rows, words in a row], over the whole allocation."""
    first_rows: torch.Tensor
    """Rows of block 0; on the device, in the order in which they lie in a slot."""
    rows_per_block: int
    """From a block to the same row of the next one."""

    def index(self, block_ids: torch.Tensor) -> torch.Tensor:
        """The rows of those blocks, block by block."""
        return (block_ids[:, None] * self.rows_per_block + self.first_rows[None, :]).flatten()


class BlockRows:
    """Every layer's KV, [num_blocks, ...] each, copied by whole blocks.

    A slot holds `slot_bytes`: a block's rows, one allocation of the device's after the other.
    Raises UnknownLayoutError for KV that cannot be addressed by block.
    """

    def __init__(self, planes: Sequence[torch.Tensor]) -> None:
        self.device = planes[0].device if planes else torch.device("cpu")
        self.num_blocks = min((int(plane.shape[0]) for plane in planes), default=0)
        self._memories = [_memory_of(group) for group in _by_allocation(planes)]
        self.slot_bytes = sum(_bytes_of(memory) for memory in self._memories)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def gather(self, block_ids: Sequence[int], into: torch.Tensor) -> None:
        """into: bytes, [at least as many, slot_bytes], on the device."""
        ids = self._on_device(block_ids)
        for memory, part in self._parts(into[: len(ids)]):
            index, rows = memory.index(ids), memory.rows
            words = part.view(rows.dtype)
            if words.is_contiguous():
                torch.index_select(rows, 0, index, out=words.view(-1, rows.shape[1]))
            else:
                words.copy_(rows.index_select(0, index).view(words.shape))

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def scatter(self, source: torch.Tensor, block_ids: Sequence[int]) -> None:
        """The way back: `source` as `gather` fills it."""
        ids = self._on_device(block_ids)
        for memory, part in self._parts(source[: len(ids)]):
            words = part.view(memory.rows.dtype).reshape(-1, memory.rows.shape[1])
            memory.rows.index_copy_(0, memory.index(ids), words)

    def _on_device(self, block_ids: Sequence[int]) -> torch.Tensor:
        if not all(0 <= block < self.num_blocks for block in block_ids):
            raise LookupError(f"no block among {list(block_ids)} beyond {self.num_blocks - 1}")
        # Memory that is not pinned may have the host wait for what is queued on the stream.
        pinned = self.device.type == "cuda"
        ids = torch.tensor(block_ids, dtype=torch.int64, pin_memory=pinned)
        return ids.to(self.device, non_blocking=True)

    def _parts(self, slots: torch.Tensor) -> Iterable[tuple[_Memory, torch.Tensor]]:
        start = 0
        for memory in self._memories:
            yield memory, slots[:, start : start + _bytes_of(memory)]
            start += _bytes_of(memory)


def _bytes_of(memory: _Memory) -> int:
    """Of one block."""
    return int(len(memory.first_rows) * memory.rows.shape[1] * memory.rows.element_size())


def _by_allocation(planes: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Layers of one allocation whose blocks are equally far apart."""
    groups: dict[tuple[int, int], list[torch.Tensor]] = {}
    for plane in planes:
        if plane.dim() < 2:
            raise UnknownLayoutError(f"KV of shape {tuple(plane.shape)} is not paged by block")
        where = (plane.untyped_storage().data_ptr(), _block_stride(plane))
        groups.setdefault(where, []).append(plane)
    if not groups:
        raise UnknownLayoutError("there is no KV")
    return [sorted(layers, key=torch.Tensor.data_ptr) for layers in groups.values()]


def _block_stride(plane: torch.Tensor) -> int:
    """In bytes."""
    return int(plane.stride(0) * plane.element_size())


def _memory_of(planes: list[torch.Tensor]) -> _Memory:
    """planes: a group of `_by_allocation`."""
    block_stride = _block_stride(planes[0])
    runs = _joined(run for plane in planes for run in _runs(plane))
    row_bytes = math.gcd(block_stride, *(number for run in runs for number in run))
    word = next(word for word in WORDS if row_bytes % word.itemsize == 0)
    allocation = torch.empty(0, dtype=torch.int8, device=planes[0].device)
    allocation.set_(planes[0].untyped_storage())
    num_rows = allocation.numel() // row_bytes
    rows = allocation[: num_rows * row_bytes].view(word).view(num_rows, -1)
    first = [
        row
        for start, length in runs
        for row in range(start // row_bytes, (start + length) // row_bytes)
    ]
    first_rows = torch.tensor(first, dtype=torch.int64, device=allocation.device)
    return _Memory(rows, first_rows, block_stride // row_bytes)


def _joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, length) of the same bytes, each once: layers that share one KV, and those of several
    KV groups, see the same memory."""
    joined: list[tuple[int, int]] = []
    for start, length in sorted(set(runs)):
        last, reach = joined[-1] if joined else (start, -1)
        if start < last + reach:
            joined[-1] = (last, max(reach, start + length - last))
        else:
            joined.append((start, length))
    return joined


def _runs(plane: torch.Tensor) -> list[tuple[int, int]]:
    """(start, length) in bytes of the stretches that block 0 of one layer is made of."""
    axes: list[int] = sorted(range(1, plane.dim()), key=lambda axis: int(plane.stride(axis)))
    length = 1
    outer: list[tuple[int, int]] = []
    for axis in axes:
        size, stride = int(plane.shape[axis]), int(plane.stride(axis))
        if stride == length and not outer:
            length *= size
        elif size > 1:
            outer.append((size, stride))
    starts = [int(plane.storage_offset())]
    for size, stride in outer:
        starts = [start + i * stride for i in range(size) for start in starts]
    item = plane.element_size()
    return [(start * item, length * item) for start in sorted(starts)]
