"""Carries out the scheduler's copy orders on a CUDA device, on a stream of its own."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from conserve.engine.checkpoint.copier import Store
from conserve.engine.checkpoint.copy_queue import num_bytes_of
from conserve.engine.checkpoint.orders import Ended, Orders, Report

MEASURED_SLOTS = 8
"""Blocks copied to measure the link at start."""


@dataclass(slots=True)
class _Under:
    """A job that is queued on the stream."""

    number: int
    num_bytes: int
    failed_slots: set[int]
    begun: Any
    done: Any


class StreamCopier:
    """For CUDA: copies are queued on a low-priority stream behind what the forwards before this
    step compute, so that they run beside the step's own forward. A forward that may overwrite a
    block waits on the device for the copies out of it; the host waits for nothing.

    What is queued on a stream cannot be taken back: a job that is dropped in a later step than
    it came in is carried out, and waited for.
    """

    def __init__(
        self, store: Store, slot_bytes: int, num_slots: int, block_size: int, device: Any
    ) -> None:
        self._store = store
        self._slot_bytes = slot_bytes
        self._block_size = block_size
        lowest, _ = torch.cuda.Stream.priority_range()
        self._stream = torch.cuda.Stream(device, priority=lowest)
        self._under: deque[_Under] = deque()
        self._waits: deque[tuple[Any, Any]] = deque()
        self._report = Report(bytes_per_s=self._measure(num_slots))

    def _measure(self, num_slots: int) -> float:
        """Bytes a second from the device to the host. The slots hold nothing yet."""
        slots = list(range(min(MEASURED_SLOTS, num_slots)))
        for _ in range(2):
            self._stream.synchronize()
            started_s = time.perf_counter()
            with torch.cuda.stream(self._stream):
                self._store.write([0] * len(slots), slots)
            self._stream.synchronize()
        seconds = max(time.perf_counter() - started_s, 1e-9)
        return len(slots) * self._slot_bytes / seconds

    def begin_step(self, orders: Orders) -> None:
        compute = torch.cuda.current_stream()
        if orders.moves or orders.jobs:
            # Earlier forwards fill the blocks that are copied, and read those that are loaded.
            self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            if orders.moves:
                self._report.lost_slots |= self._store.move(orders.moves)
            dropped = set(orders.drop)
            for job in orders.jobs:
                self._queue(job, dropped=job.number in dropped)
        self._wait(orders.wait, compute)

    def _queue(self, job: Any, *, dropped: bool) -> None:
        if dropped:
            self._report.ended[job.number] = Ended(dropped=True)
            return
        begun = torch.cuda.Event(enable_timing=True)
        done = torch.cuda.Event(enable_timing=True)
        begun.record()
        if job.store:
            failed = self._store.write(job.block_ids, job.slots, job.ranges or None)
        else:
            failed = self._store.read(job.slots, job.block_ids)
        done.record()
        num_bytes = num_bytes_of(job, len(job.slots), self._slot_bytes, self._block_size)
        self._under.append(_Under(job.number, num_bytes, failed, begun, done))

    def _wait(self, numbers: list[int], compute: Any) -> None:
        awaited = [job.done for job in self._under if job.number in set(numbers)]
        if not any(not done.query() for done in awaited):
            return
        before = torch.cuda.Event(enable_timing=True)
        after = torch.cuda.Event(enable_timing=True)
        before.record(compute)
        for done in awaited:
            compute.wait_event(done)
        after.record(compute)
        self._waits.append((before, after))

    def report(self) -> Report | None:
        while self._under and self._under[0].done.query():
            job = self._under.popleft()
            seconds = job.begun.elapsed_time(job.done) / 1e3
            self._report.ended[job.number] = Ended(
                failed_slots=job.failed_slots, num_bytes=job.num_bytes, seconds=seconds
            )
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._report.wait_s += before.elapsed_time(after) / 1e3
        if self._report.is_empty():
            return None
        report, self._report = self._report, Report()
        return report

    def close(self) -> None:
        self._stream.synchronize()
