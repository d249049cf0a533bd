"""Carries out the scheduler's copy orders on one worker, beside the forward."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from threading import Thread
from typing import Protocol

from conserve.engine.checkpoint.copy_queue import CopyQueue
from conserve.engine.checkpoint.orders import Orders, Report
from conserve.engine.checkpoint.pieces import Moves, Piece
from conserve.engine.checkpoint.streams import StreamCopies
from conserve.engine.door import init_logger

logger = init_logger("vllm.conserve")


class Copier(Protocol):
    """What the connector asks of a worker's copier."""

    def begin_step(self, orders: Orders) -> None:
        """Before the forward: take the orders, and come back when what is run from here on may
        overwrite blocks that have changed hands."""

    def report(self) -> Report | None: ...
    def settle(self) -> None:
        """Come back when no copy is under way that has been ordered."""

    def close(self) -> None: ...


class Store(Protocol):
    """The part of `SlotStore` that is used here."""

    def write(
        self,
        block_ids: Sequence[int],
        slots: Sequence[int],
        ranges: Sequence[tuple[int, int]] | None = None,
    ) -> set[int]: ...
    def read(self, slots: Sequence[int], block_ids: Sequence[int]) -> set[int]: ...
    def move(self, moves: Sequence[tuple[int, int]]) -> set[int]: ...


class BlockCopies:
    """The queue's copies, carried out one block at a time: what is in work is soon over."""

    def __init__(self, queue: CopyQueue, store: Store) -> None:
        self.queue, self._store = queue, store

    def advance(self) -> None:
        """Do one block, or a step's moves. One thread at a time."""
        work = self.queue.next()
        if isinstance(work, Moves):
            targets = [slot for _, slot in work.moves]
            self.queue.moved(attempt(lambda: self._store.move(work.moves), targets))
        elif work is not None:
            started_s = time.perf_counter()
            failed = self.copy(work)
            self.queue.done(work, failed, time.perf_counter() - started_s)

    def copy(self, piece: Piece) -> set[int]:
        """The slots that failed."""
        store, blocks, slots = self._store, piece.block_ids, piece.slots
        if piece.job.store:
            return attempt(lambda: store.write(blocks, slots, piece.ranges), slots)
        return attempt(lambda: store.read(slots, blocks), slots)


def attempt(copy: Callable[[], set[int]], slots: Sequence[int]) -> set[int]:
    """The slots that failed. Whatever a store raises, the thread lives on: a forward may wait."""
    try:
        return copy()
    except Exception:
        logger.exception("ConServe: a copy of KV failed")
        return set(slots)


class BesideTheForward:
    """A thread that works while there is something to copy."""

    def __init__(
        self,
        queue: CopyQueue,
        prepare: Callable[[], None],
        has_work: Callable[[], bool],
        work: Callable[[], None],
    ) -> None:
        """`prepare` is called in the thread first, `work` while there is any, which is looked for
        when the queue has changed. Whichever raises ends all copying: forwards that wait go on,
        and the scheduler hears why."""
        self._queue, self._prepare = queue, prepare
        self._has_work, self._work = has_work, work
        self._closed = False
        self._thread = Thread(target=self._run, name="conserve-copier", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._queue.changed:
            self._closed = True
            self._queue.changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._prepare()
            self._work_until_closed()
        except Exception as error:
            logger.exception("ConServe: the thread that copies KV has failed")
            self._queue.give_up(f"copying failed ({type(error).__name__}: {error})")

    def _work_until_closed(self) -> None:
        queue = self._queue
        while True:
            with queue.changed:
                queue.changed.wait_for(lambda: self._has_work() or self._closed)
                if self._closed:
                    return
            self._work()


class ThreadCopier:
    """For CPUs: copies in a thread, off the forward's critical path."""

    def __init__(self, copies: BlockCopies) -> None:
        self._queue = copies.queue
        self._thread = BesideTheForward(
            copies.queue, _leave_the_forwards_core, copies.queue.has_work, copies.advance
        )

    def begin_step(self, orders: Orders) -> None:
        queue = self._queue
        queue.take(orders)
        if orders.wait and not queue.is_over(orders.wait):
            started_s = time.perf_counter()
            with queue.changed:
                queue.changed.wait_for(lambda: queue.is_over(orders.wait))
            queue.waited(time.perf_counter() - started_s)

    def report(self) -> Report | None:
        return self._queue.take_report()

    def settle(self) -> None:
        with self._queue.changed:
            self._queue.changed.wait_for(self._queue.is_idle)

    def close(self) -> None:
        self._thread.close()


class StreamCopier:
    """For devices with streams: a thread that keeps them busy."""

    def __init__(self, copies: StreamCopies) -> None:
        self._copies = copies
        self._thread = BesideTheForward(
            copies.queue, copies.prepare_thread, copies.has_work, self._pump
        )

    def begin_step(self, orders: Orders) -> None:
        self._copies.begin_step(orders)

    def report(self) -> Report | None:
        return self._copies.report()

    def settle(self) -> None:
        self._copies.settle()

    def close(self) -> None:
        self._thread.close()
        self._copies.close()

    def _pump(self) -> None:
        if not self._copies.pump():
            self._copies.wait_for_room()


def _leave_the_forwards_core() -> None:
    """vLLM pins the worker's threads to cores; the copier may run on any."""
    try:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    except (AttributeError, OSError):
        return
