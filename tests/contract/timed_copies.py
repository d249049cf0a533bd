"""The worker's copier on a virtual clock: one link of a known speed, as the simulator has it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from conserve.engine.checkpoint.orders import Ended, Job, Orders, Report
from tests.contract.situation import TOKEN_BYTES
from tests.engine.copies import PretendStore, rank_is_ready
from tests.engine.device import Device


class TimedCopier:
    """Carries whole blocks in the order of the orders, each to its end, wanted or not, as the
    simulator's link does. `waited_s` is how long the step's forward has to wait."""

    def __init__(self, device: Device, clock: Callable[[], float], tokens_per_s: float) -> None:
        self.store = PretendStore(device)
        self.waited_s = 0.0
        self._clock = clock
        self._block_size = device.groups[0].block_size
        self._tokens_per_s = tokens_per_s
        self._free_s = 0.0
        self._under: deque[tuple[float, Job, Ended]] = deque()
        self._dropped: list[int] = []

    @property
    def next_load_s(self) -> float | None:
        """When the first of the loads under way will be over."""
        return min((done_s for done_s, job, _ in self._under if not job.store), default=None)

    def begin_step(self, orders: Orders) -> None:
        assert not orders.moves, "there is one tier only"
        now_s = self._clock()
        self._free_s = max(self._free_s, now_s)
        for job in orders.jobs:
            if job.number in orders.drop:
                self._dropped.append(job.number)
                continue
            ended = self._copy(job)
            self._free_s += ended.seconds
            self._under.append((self._free_s, job, ended))
        done = [done_s for done_s, job, _ in self._under if job.number in orders.wait]
        self.waited_s = max([now_s, *done]) - now_s

    def _copy(self, job: Job) -> Ended:
        """At once: until it is over nobody writes to its blocks, and nobody reads what it loads."""
        if job.store:
            failed = self.store.write(job.block_ids, job.slots, job.ranges or None)
        else:
            failed = self.store.read(job.slots, job.block_ids)
        num_tokens = len(job.slots) * self._block_size
        return Ended(
            failed_slots=failed,
            num_bytes=num_tokens * TOKEN_BYTES,
            seconds=num_tokens / self._tokens_per_s,
        )

    def report(self) -> Report | None:
        report, now_s = Report(), self._clock()
        while self._under and self._under[0][0] <= now_s:
            _, job, ended = self._under.popleft()
            report.ended[job.number] = ended
        report.ended |= {number: Ended(dropped=True) for number in self._dropped}
        self._dropped.clear()
        return None if report.is_empty() else report

    def settle(self) -> None:
        """Time does not pass while an engine is paused here."""

    def close(self) -> None:
        """Nothing runs on its own."""


def give_link(scheduler: Any, device: Device, tokens_per_s: float) -> TimedCopier:
    """Our connector as a worker has it, and a scheduler that knows the link's speed."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from conserve.engine.connector import ConserveConnector

    connector = ConserveConnector(
        scheduler.vllm_config, KVConnectorRole.WORKER, scheduler.kv_cache_config
    )
    copier = TimedCopier(device, scheduler.clock, tokens_per_s)
    connector.worker_side.copies.copier = copier
    device.connector = connector
    rank_is_ready(scheduler)
    scheduler.checkpointer.bandwidth.measured(tokens_per_s * TOKEN_BYTES)
    return copier
