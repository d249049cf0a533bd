"""What a worker is to copy next, and what has become of it: the order of copies in one place."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from conserve.engine.checkpoint.orders import Ended, Job, Orders, Report
from conserve.engine.checkpoint.pieces import Batch, Moves, Piece


@dataclass(slots=True)
class _Open:
    """A job that is not over."""

    job: Job
    after: Any
    num_taken: int = 0
    num_done: int = 0
    """Blocks, from the first one on."""
    dropped: bool = False
    failed_slots: set[int] = field(default_factory=set)
    seconds: float = 0.0

    @property
    def is_over(self) -> bool:
        """Nothing of it is in work, and nothing is left to take."""
        rest = 0 if self.dropped else len(self.job.slots) - self.num_taken
        return not rest and self.num_done == self.num_taken


class CopyQueue:
    """Jobs and moves, handed out piece by piece to whoever copies. Any thread may call any method.

    Moves go first: neither end of one is used by a job that is still open (the pool pins those).
    Jobs that a forward waits for overtake the others; else they go in the order of the scheduler.
    A job that is dropped is over with the pieces in work, at once where there are none: what was
    not handed out is neither read nor written any more.
    """

    def __init__(self, block_bytes: int = 0, block_size: int | None = None) -> None:
        """`block_size` in tokens, where part of a block may be copied; None: blocks go whole."""
        self._block_bytes, self._block_size = block_bytes, block_size
        self._moves: deque[Moves] = deque()
        self._urgent: deque[int] = deque()
        self._others: deque[int] = deque()
        """Numbers of jobs with blocks left to take, in their order."""
        self._open: dict[int, _Open] = {}
        self._report = Report()
        self.is_given_up = False
        self.changed = threading.Condition(threading.RLock())

    # A step's orders

    def take(self, orders: Orders, after: Any = None) -> None:
        """Queue them. `after` is handed on with every piece of the jobs."""
        with self.changed:
            if self.is_given_up:
                return
            if orders.moves:
                self._moves.append(Moves(list(orders.moves)))
            for job in orders.jobs:
                self._open[job.number] = _Open(job, after)
                self._others.append(job.number)
            self._drop(orders.drop)
            self._hurry(orders.wait)
            self.changed.notify_all()

    def _drop(self, numbers: Iterable[int]) -> None:
        # One may be named twice: its blocks change hands, and then all copies are forgotten.
        dropped = [self._open[number] for number in {*numbers} & self._open.keys()]
        for one in dropped:
            one.dropped = True
        self._forget({one.job.number for one in dropped})
        for one in dropped:
            self._end_if_over(one)

    def _hurry(self, numbers: Collection[int]) -> None:
        hurried = [number for number in self._others if number in set(numbers)]
        self._forget(set(hurried))
        self._urgent.extend(hurried)

    def _forget(self, numbers: set[int]) -> None:
        if numbers:
            self._urgent = deque(n for n in self._urgent if n not in numbers)
            self._others = deque(n for n in self._others if n not in numbers)

    # What is to be copied

    def has_work(self) -> bool:
        return bool(self._moves or self._urgent or self._others)

    def is_over(self, numbers: Sequence[int]) -> bool:
        return self._open.keys().isdisjoint(numbers)

    def next(self, most_blocks: int = 1, *, urgent_only: bool = False) -> Moves | Piece | None:
        """Hand out what comes next, or None. Of it is to be said when it is done: `moved`, `done`.
        One at a time for moves, since later pieces may use the slots that they free."""
        with self.changed:
            if urgent_only and not self._urgent:
                return None
            if self._moves:
                return self._moves.popleft()
            lane = self._urgent or self._others
            return self._piece(lane, most_blocks) if lane else None

    def _piece(self, lane: deque[int], most_blocks: int) -> Piece:
        one = self._open[lane[0]]
        start = one.num_taken
        one.num_taken = min(start + most_blocks, len(one.job.slots))
        if one.num_taken == len(one.job.slots):
            lane.popleft()
        return Piece(one.job, start, one.num_taken, one.after)

    def next_batch(self, most_blocks: int, *, urgent_only: bool = False) -> Moves | Batch:
        """As `next`, with pieces of the jobs that follow in the same direction and lane, while
        they have room. Empty where there is nothing."""
        with self.changed:
            first = self.next(most_blocks, urgent_only=urgent_only)
            if not isinstance(first, Piece):
                return first or Batch(())
            pieces, room = [first], most_blocks - len(first.slots)
            lane = self._urgent if urgent_only else self._urgent or self._others
            while room and lane and self._open[lane[0]].job.store is first.job.store:
                pieces.append(self._piece(lane, room))
                room -= len(pieces[-1].slots)
            return Batch(pieces)

    # What has become of it

    def is_idle(self) -> bool:
        """Whether no job is open: nothing reads or writes blocks."""
        with self.changed:
            return not self._open

    def moved(self, lost_slots: set[int]) -> None:
        with self.changed:
            self._report.lost_slots |= lost_slots

    def done(self, piece: Piece, failed_slots: set[int], seconds: float) -> None:
        with self.changed:
            one = self._open.get(piece.job.number)
            if one is None:  # given up meanwhile
                return
            one.num_done += piece.stop - piece.start
            one.failed_slots |= failed_slots
            one.seconds += seconds
            self._end_if_over(one)

    def put_back_if_dropped(self, piece: Piece) -> bool:
        """Whether the job has been dropped since the piece was handed out. It counts as never
        begun then."""
        with self.changed:
            one = self._open.get(piece.job.number)
            if one is None:
                return True
            if one.dropped:
                one.num_taken -= len(piece.slots)
                self._end_if_over(one)
            return one.dropped

    def wake(self) -> None:
        """There is something to do for whoever copies."""
        with self.changed:
            self.changed.notify_all()

    def _end_if_over(self, one: _Open) -> None:
        if not one.is_over:
            return
        job = one.job
        del self._open[job.number]
        self._report.ended[job.number] = Ended(
            dropped=one.num_done < len(job.slots),
            failed_slots=one.failed_slots,
            num_bytes=num_bytes_of(job, one.num_done, self._block_bytes, self._block_size),
            seconds=one.seconds,
        )
        self.changed.notify_all()

    def give_up(self, why: str) -> None:
        """Nobody copies any more: all jobs are over, as those to come will be, and the report says
        why. What is queued on a device goes on there."""
        with self.changed:
            self.is_given_up = True
            for lane in (self._moves, self._urgent, self._others, self._open):
                lane.clear()
            self._report = Report(unusable=why)
            self.changed.notify_all()

    # The report

    def waited(self, seconds: float) -> None:
        with self.changed:
            self._report.wait_s += seconds

    def take_report(self) -> Report | None:
        """What has ended since the last call, if anything."""
        with self.changed:
            if self._report.is_empty():
                return None
            report, self._report = self._report, Report()
            return report


def num_bytes_of(job: Job, num_blocks: int, block_bytes: int, block_size: int | None) -> int:
    """Bytes copied with the first `num_blocks` blocks of a job."""
    if not job.ranges or block_size is None:
        return num_blocks * block_bytes
    num_tokens = sum(stop - start for start, stop in job.ranges[:num_blocks])
    return num_tokens * block_bytes // block_size
