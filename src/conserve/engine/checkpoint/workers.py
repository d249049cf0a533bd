"""The worker's half: takes orders and reports, once there is a pool to copy into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conserve.engine.checkpoint.copier import Copier
from conserve.engine.checkpoint.making import (
    CpuMaking,
    Making,
    Pool,
    StreamMaking,
    packing_of_all,
    planes_of,
)
from conserve.engine.checkpoint.orders import Orders, Report
from conserve.engine.checkpoint.sizes import PoolSize
from conserve.engine.settings import EngineSettings

CANNOT = (ValueError, MemoryError, OSError, RuntimeError)
"""What stands against a pool: a layout, memory of the host, a disk, memory of the device."""


class CheckpointWorker:
    """Carries out orders on one rank. It reports when its pool is there. A worker that cannot
    have one says so in a report, once, and the engine goes on without checkpoints."""

    def __init__(self, settings: EngineSettings, size: PoolSize, num_blocks: int) -> None:
        self._settings, self._size, self._num_blocks = settings, size, num_blocks
        self._making: Making | None = None
        self._pool: Pool | None = None
        self._news: Report | None = None
        """To be reported before anything else."""
        self.copier: Copier | None = None

    def register(self, kv_caches: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
        """Begin to make the pool, once vLLM has made its KV caches; `layers` are its layers by
        name. They are not looked at where the configuration says that nothing is kept."""
        if self._size.why_none:
            self._news = Report(unusable=self._size.why_none)
            return
        try:
            self._making = self._begin(kv_caches, layers)
        except CANNOT as error:
            self._cannot(error)

    def _begin(self, kv_caches: Mapping[str, Any], layers: Mapping[str, Any]) -> Making:
        planes = planes_of(kv_caches, self._num_blocks)
        if planes and planes[0].is_cuda:
            from conserve.engine.cuda import CudaDevice

            return StreamMaking(planes, self._size, self._settings, CudaDevice(planes[0].device))
        return CpuMaking(planes, self._size, self._settings, packing_of_all(kv_caches, layers))

    def begin_step(self, orders: Orders) -> None:
        if orders.give_back:
            self.close()
            return
        if self._making is not None and self._pool is None:
            self._making.hold(still=orders.hold_still)
            if not orders.hold_still:
                self._look(self._making)
        if self.copier is not None and orders.num_slots:
            if self._pool is not None:
                self._pool.slots.agree(orders.num_slots)
            self.copier.begin_step(orders)

    def hold(self, *, still: bool) -> None:
        """Disturb nothing meanwhile, while there is no pool yet."""
        if self._making is not None and self._pool is None:
            self._making.hold(still=still)

    def _look(self, making: Making) -> None:
        """Whether the pool is there."""
        try:
            pool = making.finished()
        except CANNOT as error:
            self._cannot(error)
            return
        if pool is not None:
            self._pool, self.copier = pool, pool.copier
            self._news = Report(pools=[pool.slots.num_slots], bytes_per_s=pool.bytes_per_s)

    def _cannot(self, error: Exception) -> None:
        self._news = Report(unusable=str(error) or type(error).__name__)
        self.close()

    def report(self) -> Report | None:
        if self._news is not None:
            news, self._news = self._news, None
            return news
        return self.copier.report() if self.copier else None

    def settle(self) -> None:
        """Come back when no copy reads or writes blocks any more, before the next step's orders."""
        if self.copier is not None:
            self.copier.settle()

    def close(self) -> None:
        """End every copy, and give back all memory. Nothing is begun after this."""
        copier, making = self.copier, self._making
        self.copier = self._making = self._pool = None
        for one in (copier, making):
            if one is not None:
                one.close()
