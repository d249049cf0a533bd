"""A worker's copies: in order, dropped or waited for as told, and never an exception."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine.checkpoint.copier import BesideTheForward, BlockCopies, ThreadCopier
from conserve.engine.checkpoint.copy_queue import CopyQueue, num_bytes_of
from conserve.engine.checkpoint.orders import Ended, Job, Orders, Report
from conserve.engine.checkpoint.pieces import Piece

pytestmark = pytest.mark.engine

LONG_S = 30.0
"""No test waits as long unless it fails."""


class GatedStore:
    """Writes down what it is asked for; every copy waits until the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.done: list[tuple[str, int, int]] = []

    def _copy(self, what: str, block_ids: Sequence[int], slots: Sequence[int]) -> set[int]:
        self.begun.set()
        assert self.gate.wait(LONG_S)
        self.done += [(what, b, s) for b, s in zip(block_ids, slots, strict=True)]
        return {slot for slot in slots if slot == 99}

    def write(
        self,
        block_ids: Sequence[int],
        slots: Sequence[int],
        ranges: Sequence[tuple[int, int]] | None = None,
    ) -> set[int]:
        return self._copy("write", block_ids, slots)

    def read(self, slots: Sequence[int], block_ids: Sequence[int]) -> set[int]:
        return self._copy("read", block_ids, slots)

    def move(self, moves: Sequence[tuple[int, int]]) -> set[int]:
        self.done += [("move", a, b) for a, b in moves]
        return {b for _, b in moves if b == 99}


def store(number: int, *pairs: tuple[int, int]) -> Job:
    return Job(number, True, [b for b, _ in pairs], [s for _, s in pairs])


def copies_into(slots: GatedStore) -> BlockCopies:
    return BlockCopies(CopyQueue(block_bytes=10), slots)


def finish(copies: BlockCopies) -> Report:
    while copies.queue.has_work():
        copies.advance()
    report = copies.queue.take_report()
    assert report is not None
    return report


def test_orders_are_carried_out_in_their_order() -> None:
    slots = GatedStore()
    slots.gate.set()
    copies = copies_into(slots)
    copies.queue.take(Orders(jobs=[store(1, (5, 0))]))
    copies.advance()
    copies.queue.take(Orders(moves=[(0, 3)], jobs=[store(2, (6, 0)), Job(3, False, [7], [3])]))
    report = finish(copies)
    assert slots.done == [("write", 5, 0), ("move", 0, 3), ("write", 6, 0), ("read", 7, 3)]
    assert set(report.ended) == {1, 2, 3}
    assert report.ended[1].num_bytes == 10
    assert copies.queue.take_report() is None


def test_a_dropped_job_ends_with_the_block_in_work() -> None:
    slots = GatedStore()
    slots.gate.set()
    copies = copies_into(slots)
    copies.queue.take(Orders(jobs=[store(1, (5, 0), (6, 1), (7, 2)), store(2, (8, 3))]))
    copies.advance()
    copies.queue.take(Orders(drop=[1, 77]))
    report = finish(copies)
    assert slots.done == [("write", 5, 0), ("write", 8, 3)]
    assert report.ended[1].dropped
    assert report.ended[1].num_bytes == 10
    assert not report.ended[2].dropped


def test_a_dropped_job_that_has_not_begun_is_over_at_once() -> None:
    copies = copies_into(GatedStore())
    copies.queue.take(Orders(jobs=[store(1, (5, 0)), store(2, (6, 1)), store(3, (7, 2))]))
    copies.queue.take(Orders(drop=[2], wait=[2]))
    assert copies.queue.is_over([2])
    report = copies.queue.take_report()
    assert report is not None
    assert report.ended == {2: Ended(dropped=True)}
    assert copies.queue.has_work()


def test_what_a_forward_waits_for_overtakes_the_others() -> None:
    """And moves overtake all: they free the slots that later copies fill."""
    slots = GatedStore()
    slots.gate.set()
    copies = copies_into(slots)
    copies.queue.take(Orders(jobs=[Job(1, False, [1, 2, 3], [7, 8, 9]), store(2, (5, 0))]))
    copies.advance()
    copies.queue.take(Orders(moves=[(3, 4)], jobs=[store(3, (5, 1), (6, 3))], wait=[2, 3]))
    finish(copies)
    assert slots.done == [
        ("read", 1, 7),
        ("move", 3, 4),
        ("write", 5, 0),
        ("write", 5, 1),
        ("write", 6, 3),
        ("read", 2, 8),
        ("read", 3, 9),
    ]


def test_failures_are_reported_not_raised() -> None:
    slots = GatedStore()
    slots.gate.set()
    copies = copies_into(slots)
    copies.queue.take(Orders(moves=[(1, 99)], jobs=[store(1, (5, 99), (6, 2))]))
    report = finish(copies)
    assert report.lost_slots == {99}
    assert report.ended[1].failed_slots == {99}


def test_a_store_that_raises_is_a_copy_that_failed() -> None:
    """The thread must live on: a forward may wait for it."""

    class Broken(GatedStore):
        def _copy(self, *args: Any) -> set[int]:
            raise RuntimeError("no such device")

    copies = copies_into(Broken())
    copies.queue.take(Orders(jobs=[store(1, (5, 0), (6, 1)), Job(2, False, [5], [0])]))
    report = finish(copies)
    assert report.ended[1].failed_slots == {0, 1}
    assert report.ended[2].failed_slots == {0}


def test_the_forward_waits_for_what_it_is_told_to() -> None:
    slots = GatedStore()
    copier = ThreadCopier(copies_into(slots))
    copier.begin_step(Orders(jobs=[store(1, (5, 0)), store(2, (6, 1))]))
    assert slots.begun.wait(LONG_S), "copies begin without anybody waiting"
    forward = threading.Thread(target=copier.begin_step, args=(Orders(wait=[1]),))
    forward.start()
    assert not slots.done
    assert forward.is_alive()
    slots.gate.set()
    forward.join(LONG_S)
    assert not forward.is_alive()
    assert slots.done[0] == ("write", 5, 0)
    copier.begin_step(Orders(wait=[2]))
    assert slots.done == [("write", 5, 0), ("write", 6, 1)]
    report = copier.report()
    assert report is not None
    assert report.wait_s > 0
    copier.close()


def test_a_forward_waits_for_no_load_that_has_nothing_to_do_with_it() -> None:
    """A load of many blocks is in work; the forward overwrites the blocks of another request,
    whose copy has not begun and is dropped."""
    slots = GatedStore()
    copier = ThreadCopier(copies_into(slots))
    long = Job(1, False, list(range(500)), list(range(500)))
    copier.begin_step(Orders(jobs=[long, store(2, (600, 600))]))
    assert slots.begun.wait(LONG_S)
    orders = Orders(drop=[2], wait=[2])
    forward = threading.Thread(target=copier.begin_step, args=(orders,), daemon=True)
    forward.start()
    forward.join(LONG_S)
    assert not forward.is_alive(), "it waits for the load, whose gate is shut"
    assert not slots.done
    report = copier.report()
    assert report is not None
    assert report.ended == {2: Ended(dropped=True)}
    copier.begin_step(Orders(drop=[1]))
    slots.gate.set()
    copier.close()


@pytest.mark.parametrize("failing", ["prepare", "work"])
def test_a_thread_that_fails_holds_nobody_up_and_says_so(
    failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    queue = CopyQueue()

    def do(what: str) -> None:
        if what == failing:
            raise LookupError("no such stream")

    thread = BesideTheForward(queue, lambda: do("prepare"), queue.has_work, lambda: do("work"))
    queue.take(Orders(moves=[(0, 1)], jobs=[store(1, (5, 0)), store(2, (6, 1))]))
    with queue.changed:
        assert queue.changed.wait_for(lambda: queue.is_over([1, 2]), LONG_S)
    report = queue.take_report()
    assert report == Report(unusable="copying failed (LookupError: no such stream)")
    queue.take(Orders(jobs=[store(3, (5, 0))]))
    assert queue.is_over([3])
    assert not queue.has_work()
    assert queue.take_report() is None
    thread.close()


def test_what_is_done_of_a_copy_that_was_given_up_counts_for_nothing() -> None:
    """It was on a device, and goes on there."""
    queue = CopyQueue()
    queue.take(Orders(jobs=[store(1, (5, 0), (6, 1))]))
    piece = queue.next()
    assert isinstance(piece, Piece)
    queue.give_up("no thread")
    queue.done(piece, set(), 0.1)
    assert queue.take_report() == Report(unusable="no thread")


def test_reports_of_ranks_add_up() -> None:
    one = Report({1: Ended(num_bytes=5, seconds=0.1)}, bytes_per_s=7.0)
    two = Report({1: Ended(failed_slots={3}, num_bytes=5, seconds=0.3), 2: Ended()}, {4})
    total = one.aggregate(two)
    assert total.ended[1] == Ended(2, False, {3}, 10, 0.3)
    assert total.ended[2].num_ranks == 1
    assert (total.lost_slots, total.bytes_per_s) == ({4}, 7.0)


def test_bytes_of_a_job_that_copies_some_tokens() -> None:
    """Blocks of 10 tokens and 80 bytes; the second is copied in part."""
    job = Job(1, True, [4, 5, 6], [0, 1, 2], [(0, 10), (3, 5), (0, 1)])
    assert [num_bytes_of(job, n, 80, 10) for n in range(4)] == [0, 80, 96, 104]
    assert num_bytes_of(store(2, (4, 0), (5, 1)), 1, 80, 10) == 80
