"""How a rank's pool comes into being, on a CPU and on CUDA."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from conserve.engine.checkpoint.copier import BlockCopies, Copier, StreamCopier, ThreadCopier
from conserve.engine.checkpoint.copy_queue import CopyQueue
from conserve.engine.checkpoint.device import Device
from conserve.engine.checkpoint.disk import SlotFile, try_file
from conserve.engine.checkpoint.packing import Packing, UnknownLayoutError, packing_for, whole
from conserve.engine.checkpoint.pinned import PinnedMemory, Pinning
from conserve.engine.checkpoint.rows import BlockRows
from conserve.engine.checkpoint.sizes import PoolSize
from conserve.engine.checkpoint.slots import HostSlots
from conserve.engine.checkpoint.staging import staging_buffers
from conserve.engine.checkpoint.store import SlotStore
from conserve.engine.checkpoint.streams import StreamCopies
from conserve.engine.door import group_kernel_blocks
from conserve.engine.settings import EngineSettings

MEASURED_SLOTS = 8
"""Blocks copied to measure how fast a CPU copies."""


class Pool(NamedTuple):
    """What there is once it is made."""

    slots: HostSlots
    copier: Copier
    bytes_per_s: float
    """Of copies to the host."""


class Making(Protocol):
    """A pool on its way. Making one raises what `workers.CANNOT` names."""

    def finished(self) -> Pool | None:
        """The pool, once it is there; asked until then. Raises likewise."""

    def hold(self, *, still: bool) -> None:
        """Disturb nothing meanwhile."""

    def close(self) -> None:
        """Wait for the copies that are queued on the device, and give back what was taken. Nobody
        orders any more."""


class CpuMaking:
    """Memory of a CPU comes into being as it is written to: there is nothing to wait for."""

    def __init__(
        self,
        planes: Sequence[torch.Tensor],
        size: PoolSize,
        settings: EngineSettings,
        packing: Packing,
    ) -> None:
        planes = widest_planes(planes)
        file = _disk_tier(SlotStore.slot_bytes(planes), size, settings)
        self._store = SlotStore(
            planes, size.num_slots, file, packing=packing, checksums=settings.checkpoint_verify
        )

    def finished(self) -> Pool:
        store = self._store
        queue = CopyQueue(store.slots.slot_bytes, store.tokens_apart)
        bytes_per_s = self._measure()
        return Pool(store.slots, ThreadCopier(BlockCopies(queue, store)), bytes_per_s)

    def _measure(self) -> float:
        """The slots hold nothing yet."""
        slots = list(range(min(MEASURED_SLOTS, self._store.slots.num_slots)))
        for _ in range(2):
            started_s = time.perf_counter()
            self._store.write([0] * len(slots), slots)
        num_bytes = len(slots) * self._store.slots.slot_bytes
        return num_bytes / max(time.perf_counter() - started_s, 1e-9)

    def hold(self, *, still: bool) -> None:
        """Nothing goes on by itself."""

    def close(self) -> None:
        self._store.close()


class StreamDevice(Device[Any], Pinning, Protocol):
    """One that copies by streams, from and to memory that it has pinned."""


class StreamMaking:
    """Staging buffers at once, while the device has room; memory of the host in the background."""

    def __init__(
        self,
        planes: Sequence[torch.Tensor],
        size: PoolSize,
        settings: EngineSettings,
        device: StreamDevice,
    ) -> None:
        self._settings, self._device = settings, device
        self._rows = BlockRows(planes)
        self._file = _disk_tier(self._rows.slot_bytes, size, settings)
        self._staging = staging_buffers(device, self._rows.slot_bytes)
        self._pinned = PinnedMemory(size.num_slots, self._rows.slot_bytes, device)
        self._slots: HostSlots | None = None
        self._copies: StreamCopies | None = None

    def finished(self) -> Pool | None:
        pinned = self._pinned
        if not pinned.is_ready:
            return None
        if not len(pinned.memory):
            raise MemoryError(pinned.why_not)
        slots = HostSlots(
            pinned.memory,
            pinned.slot_bytes,
            self._file,
            slots_per_section=pinned.slots_per_section,
            checksums=self._settings.checkpoint_verify,
            empty=self._device.host_empty,
        )
        queue = CopyQueue(pinned.slot_bytes)
        copies = StreamCopies(queue, self._rows, slots, self._device, self._staging)
        self._slots, self._copies = slots, copies
        bytes_per_s = copies.measure()
        return Pool(slots, StreamCopier(copies), bytes_per_s)

    def hold(self, *, still: bool) -> None:
        self._pinned.hold(still=still)

    def close(self) -> None:
        if self._copies is not None:
            self._copies.close()
        if self._slots is not None:
            self._slots.close()
        if self._file is not None:
            self._file.close()
        self._staging = []
        self._pinned.close()


def _disk_tier(slot_bytes: int, size: PoolSize, settings: EngineSettings) -> SlotFile | None:
    if not size.num_disk_slots:
        return None
    return try_file(Path(settings.checkpoint_dir), size.num_disk_slots, slot_bytes)


def planes_of(kv_caches: Mapping[str, Any], num_blocks: int) -> list[torch.Tensor]:
    """vLLM's caches as [num_blocks, ...] views, layers that share memory once if they see it alike.
    vLLM registers [blocks, heads, tokens, content] a layer; blocks may be split into several for
    the kernel. Layers of several KV groups lie in the same memory: a block is of one group."""
    planes = {
        (cache.data_ptr(), tuple(cache.shape)): group_kernel_blocks(cache, num_blocks)
        for cache in kv_caches.values()
    }
    return list(planes.values())


def widest_planes(planes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One plane for each place, for copies of whole blocks: where layers of several groups see some
    memory as blocks of other shapes, the bytes of blocks everywhere, [num_blocks, 1, 1, bytes].
    Raises UnknownLayoutError where a block is not one stretch of bytes there."""
    at_place: dict[int, list[torch.Tensor]] = defaultdict(list)
    for plane in planes:
        at_place[plane.data_ptr()].append(plane)
    if all(len(found) == 1 for found in at_place.values()):
        return list(planes)
    return [_bytes_of(found) for found in at_place.values()]


def _bytes_of(planes: Sequence[torch.Tensor]) -> torch.Tensor:
    widest = max(planes, key=lambda plane: plane[0].numel() * plane.element_size())
    if not all(plane[0].is_contiguous() for plane in planes):
        raise UnknownLayoutError("blocks of several KV cache groups are woven into each other")
    item, num_bytes = widest.element_size(), widest[0].numel() * widest.element_size()
    memory = torch.empty(0, dtype=torch.int8).set_(widest.untyped_storage())
    shape, stride = (len(widest), 1, 1, num_bytes), widest.stride(0) * item
    strides = (stride, num_bytes, num_bytes, 1)
    return memory.as_strided(shape, strides, widest.storage_offset() * item)


def packing_of_all(kv_caches: Mapping[str, Any], layers: Mapping[str, Any]) -> Packing:
    """How tokens lie in every layer's blocks, if that is known and the same in all of them; by
    whole blocks otherwise, as where layers of several groups see the same memory in other shapes,
    or where recurrent layers keep no tokens."""
    found = {
        (layer.attn_backend, getattr(layer, "isa", ""), cache.dtype, cache.shape[1:]): (
            layer,
            cache,
        )
        for name, cache in kv_caches.items()
        if (layer := layers.get(name)) is not None and hasattr(layer, "attn_backend")
    }
    if not all(hasattr(layers.get(name), "attn_backend") for name in kv_caches):
        return whole
    packings = {packing_for(layer, cache) for layer, cache in found.values()}
    places = {(cache.data_ptr(), cache.dtype, cache.shape) for cache in kv_caches.values()}
    seen_alike = len({place for place, _, _ in places}) == len(places)
    return packings.pop() if len(packings) == 1 and seen_alike else whole
