"""The worker's half: the store behind the slots, and who copies, made when first needed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conserve.engine.checkpoint.copier import BlockCopies, Copier, ThreadCopier
from conserve.engine.checkpoint.copy_queue import CopyQueue
from conserve.engine.checkpoint.orders import Orders, Report
from conserve.engine.checkpoint.packing import Packing, packing_for, whole
from conserve.engine.checkpoint.store import SlotStore
from conserve.engine.door import group_kernel_blocks, init_logger
from conserve.engine.settings import EngineSettings

logger = init_logger("vllm.conserve")

MEASURED_SLOTS = 8
"""Blocks copied to measure the link at start."""


class CheckpointWorker:
    """Carries out orders on one rank. A worker that cannot says so in its report, once, and the
    engine goes on without checkpoints."""

    def __init__(self, settings: EngineSettings, num_blocks: int) -> None:
        self._settings = settings
        self._num_blocks = num_blocks
        self._kv_caches: Mapping[str, Any] = {}
        self._layers: Mapping[str, Any] = {}
        self._unusable = ""
        self._store: SlotStore | None = None
        self.copier: Copier | None = None

    def register(self, kv_caches: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
        """Once vLLM has made them; `layers` are its layers by name. They are looked at with the
        first orders: none come for models whose KV is no plain one."""
        self._kv_caches, self._layers = kv_caches, layers

    def begin_step(self, orders: Orders) -> None:
        if not orders.num_slots:
            return
        if self.copier is None and not self._unusable:
            self._start(orders)
        if self.copier is not None:
            self.copier.begin_step(orders)

    def report(self) -> Report | None:
        if self._unusable:
            report, self._unusable = Report(unusable=self._unusable), " "
            return report if report.unusable.strip() else None
        return self.copier.report() if self.copier else None

    def close(self) -> None:
        if self.copier is not None:
            self.copier.close()
        if self._store is not None:
            self._store.close()

    def _start(self, orders: Orders) -> None:
        settings = self._settings
        try:
            planes = planes_of(self._kv_caches, self._num_blocks)
            store = self._store = SlotStore(
                planes,
                orders.num_slots,
                orders.num_disk_slots,
                Path(settings.checkpoint_dir) if settings.checkpoint_dir else None,
                packing=packing_of_all(self._kv_caches, self._layers),
                checksums=settings.checkpoint_verify,
            )
        except (ValueError, MemoryError, OSError, RuntimeError) as error:
            self._unusable = str(error) or type(error).__name__
            return
        slot_bytes = store.slot_bytes(planes)
        if planes[0].is_cuda:
            from conserve.engine.checkpoint.streams import StreamCopier

            size, device = store.block_size, planes[0].device
            self.copier = StreamCopier(store, slot_bytes, orders.num_slots, size, device)
            return
        queue = CopyQueue(slot_bytes, store.block_size)
        queue.measured(_measure(store, slot_bytes, orders.num_slots))
        self.copier = ThreadCopier(BlockCopies(queue, store))


def _measure(store: SlotStore, slot_bytes: int, num_slots: int) -> float:
    """Bytes a second from the device to the host. The slots hold nothing yet."""
    slots = list(range(min(MEASURED_SLOTS, num_slots)))
    store.write([0] * len(slots), slots)
    started_s = time.perf_counter()
    store.write([0] * len(slots), slots)
    return len(slots) * slot_bytes / max(time.perf_counter() - started_s, 1e-9)


def planes_of(kv_caches: Mapping[str, Any], num_blocks: int) -> list[Any]:
    """vLLM's caches as [num_blocks, ...] views, layers that share memory once. vLLM registers
    [blocks, heads, tokens, content] a layer; blocks may be split into several for the kernel."""
    planes = {
        (cache.data_ptr(), tuple(cache.shape)): group_kernel_blocks(cache, num_blocks)
        for cache in kv_caches.values()
    }
    return list(planes.values())


def packing_of_all(kv_caches: Mapping[str, Any], layers: Mapping[str, Any]) -> Packing:
    """How tokens lie in every layer's blocks, if that is the same in all of them; by whole
    blocks otherwise."""
    found = {
        (layer.attn_backend, getattr(layer, "isa", ""), cache.dtype, cache.shape[1:]): (
            layer,
            cache,
        )
        for name, cache in kv_caches.items()
        if (layer := layers.get(name)) is not None and hasattr(layer, "attn_backend")
    }
    packings = {packing_for(layer, cache) for layer, cache in found.values()}
    return packings.pop() if len(packings) == 1 else whole
