"""Carries out the scheduler's copy orders on one worker, beside the forward."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from conserve.engine.checkpoint.orders import Ended, Job, Orders, Report
from conserve.engine.door import init_logger

logger = init_logger("vllm.conserve")


class Store(Protocol):
    """The part of `SlotStore` that copiers use."""

    def write(
        self,
        block_ids: Sequence[int],
        slots: Sequence[int],
        ranges: Sequence[tuple[int, int]] | None = None,
    ) -> set[int]: ...
    def read(self, slots: Sequence[int], block_ids: Sequence[int]) -> set[int]: ...
    def move(self, moves: Sequence[tuple[int, int]]) -> set[int]: ...


class CopyQueue:
    """Jobs and moves in the order of the scheduler, carried out a block at a time by `advance`.

    Any thread may call any method. A job that is dropped stops after the block in work, so that
    it is over soon; what it has not reached is neither read nor written any more.
    """

    def __init__(self, store: Store, block_bytes: int = 0, block_size: int = 1) -> None:
        self._store = store
        self._block_bytes = block_bytes
        self._block_size = block_size
        self._queue: deque[Job | list[tuple[int, int]]] = deque()
        self._position = 0
        """Blocks done of the job at the head."""
        self._failed: set[int] = set()
        self._seconds = 0.0
        self._open: set[int] = set()
        """Jobs that are not over."""
        self._dropped: set[int] = set()
        self._report = Report()
        self.changed = threading.Condition()

    # The worker's main thread

    def take(self, orders: Orders) -> None:
        """Queue a step's orders."""
        with self.changed:
            if orders.moves:
                self._queue.append(list(orders.moves))
            self._queue.extend(orders.jobs)
            self._open.update(job.number for job in orders.jobs)
            self._dropped.update(self._open.intersection(orders.drop))
            self.changed.notify_all()

    def is_over(self, numbers: Sequence[int]) -> bool:
        return self._open.isdisjoint(numbers)

    def waited(self, seconds: float) -> None:
        self._report.wait_s += seconds

    def take_report(self) -> Report | None:
        with self.changed:
            if self._report.is_empty():
                return None
            report, self._report = self._report, Report()
            return report

    def measured(self, bytes_per_s: float) -> None:
        self._report.bytes_per_s = bytes_per_s

    # Whoever copies

    def has_work(self) -> bool:
        return bool(self._queue)

    def advance(self) -> None:
        """Do one block, or a move. One thread at a time."""
        with self.changed:
            head = self._queue[0] if self._queue else None
            if isinstance(head, Job) and head.number in self._dropped:
                self._end(head)
                return
        if isinstance(head, Job):
            self._copy(head)
        elif head is not None:
            lost = _attempt(lambda: self._store.move(head), [slot for _, slot in head])
            with self.changed:
                self._queue.popleft()
                self._report.lost_slots |= lost

    def _copy(self, job: Job) -> None:
        at = self._position
        block_ids, slots = job.block_ids[at : at + 1], job.slots[at : at + 1]
        started_s = time.perf_counter()
        if job.store:
            ranges = job.ranges[at : at + 1] or None
            failed = _attempt(lambda: self._store.write(block_ids, slots, ranges), slots)
        else:
            failed = _attempt(lambda: self._store.read(slots, block_ids), slots)
        self._seconds += time.perf_counter() - started_s
        with self.changed:
            self._failed |= failed
            self._position = at + 1
            if self._position >= len(job.slots):
                self._end(job)

    def _end(self, job: Job) -> None:
        self._queue.popleft()
        self._report.ended[job.number] = Ended(
            dropped=self._position < len(job.slots),
            failed_slots=self._failed,
            num_bytes=num_bytes_of(job, self._position, self._block_bytes, self._block_size),
            seconds=self._seconds,
        )
        self._position, self._failed, self._seconds = 0, set(), 0.0
        self._open.discard(job.number)
        self._dropped.discard(job.number)
        self.changed.notify_all()


def num_bytes_of(job: Job, num_blocks: int, block_bytes: int, block_size: int) -> int:
    """Bytes in the first `num_blocks` blocks of a job."""
    if not job.ranges:
        return num_blocks * block_bytes
    num_tokens = sum(stop - start for start, stop in job.ranges[:num_blocks])
    return num_tokens * block_bytes // block_size


def _attempt(copy: Callable[[], set[int]], slots: Sequence[int]) -> set[int]:
    """The slots that failed. Whatever a store raises, the thread lives on: a forward may wait."""
    try:
        return copy()
    except Exception:
        logger.exception("ConServe: a copy of KV failed")
        return set(slots)


class Copier(Protocol):
    """What the connector asks of a worker's copier."""

    def begin_step(self, orders: Orders) -> None:
        """Before the forward: take the orders, and come back when it may overwrite."""

    def report(self) -> Report | None: ...
    def close(self) -> None: ...


class ThreadCopier:
    """For CPUs: one thread of its own, off the forward's critical path."""

    def __init__(self, queue: CopyQueue, clock: Callable[[], float] = time.perf_counter) -> None:
        self.queue = queue
        self._clock = clock
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="conserve-copier", daemon=True)
        self._thread.start()

    def begin_step(self, orders: Orders) -> None:
        self.queue.take(orders)
        if orders.wait and not self.queue.is_over(orders.wait):
            started_s = self._clock()
            with self.queue.changed:
                self.queue.changed.wait_for(lambda: self.queue.is_over(orders.wait))
            self.queue.waited(self._clock() - started_s)

    def report(self) -> Report | None:
        return self.queue.take_report()

    def close(self) -> None:
        with self.queue.changed:
            self._closed = True
            self.queue.changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        _leave_the_forwards_core()
        queue = self.queue
        while True:
            with queue.changed:
                queue.changed.wait_for(lambda: queue.has_work() or self._closed)
                if self._closed:
                    return
            queue.advance()


def _leave_the_forwards_core() -> None:
    """vLLM pins the worker's threads to cores; the copier may run on any."""
    try:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    except (AttributeError, OSError):
        return
