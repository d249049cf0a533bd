"""Carries out the scheduler's copy orders beside the forwards of a device with streams.

    to the host    the blocks of a piece are gathered into a staging buffer on the device by one
                   kernel, and the buffer is copied to the slots in bulk
    and back       slots to a staging buffer in bulk, which one kernel scatters

    stream     what runs on it, in order
    compute    forwards; gathers that the next forward waits for
    gathers    all other gathers
    copies     buffers to slots, slots to buffers, scatters

What one stream does is ordered after another's by these events only:

    after      on compute, when a job was ordered: its blocks hold what is to be copied, and
               nobody reads the blocks that are to be filled any more
    released   a piece's blocks are not touched any more: gathered, or scattered into. A forward
               that may overwrite blocks waits for this, and never for a copy to the host
    done       a piece's slots are whole, or read, and its buffer is free
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from conserve.engine.checkpoint.copy_queue import CopyQueue, Moves, Piece
from conserve.engine.checkpoint.device import Device, Event, Stream
from conserve.engine.checkpoint.orders import Job, Orders, Report
from conserve.engine.checkpoint.rows import BlockRows
from conserve.engine.checkpoint.slots import FAULTS, DiskError, HostSlots

NUM_BUFFERS = 4
"""Pieces under way at once: while one is copied, others are gathered and ordered."""
BUFFER_BYTES = 32 << 20
"""Less than a millisecond of the link, and few enough pieces a second that ordering them costs
the host little."""


def staging_buffers(device: Device[Any], slot_bytes: int) -> list[torch.Tensor]:
    """Bytes, [blocks, slot_bytes] each. Raises RuntimeError where the device has no room."""
    num_bytes = max(1, BUFFER_BYTES // slot_bytes) * slot_bytes
    return [device.empty(num_bytes).view(-1, slot_bytes) for _ in range(NUM_BUFFERS)]


class _Buffer:
    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        """Bytes, [blocks, slot_bytes], on the device."""
        self.done: Event | None = None
        """Of the last piece that used it."""

    @property
    def is_free(self) -> bool:
        return self.done is None or self.done.query()


class _Flight(NamedTuple):
    """A piece that is queued on the streams."""

    piece: Piece
    released: Event
    begun: Event
    done: Event


class StreamCopies:
    """Queues copies on the streams, as many as there are staging buffers, and sees them end.

    `begin_step` and `report` are called by the worker's main thread, `pump` and `wait_for_room`
    by one thread that keeps the streams busy between steps.
    """

    def __init__(
        self,
        queue: CopyQueue,
        rows: BlockRows,
        slots: HostSlots,
        device: Device[Any],
        staging: Sequence[torch.Tensor],
    ) -> None:
        """staging: as `staging_buffers` makes them."""
        self.queue, self._rows, self._slots, self._device = queue, rows, slots, device
        self._gathers, self._copies = device.side_stream(), device.side_stream()
        self._buffers = deque(map(_Buffer, staging))
        """The one that was used longest ago first."""
        self._num_blocks = len(staging[0])
        """In a piece."""
        self._in_flight: deque[_Flight] = deque()
        self._waits: deque[tuple[Event, Event]] = deque()
        self._lock = threading.Lock()

    def measure(self) -> float:
        """Bytes a second from a staging buffer to slots. They hold nothing yet."""
        num_blocks = min(self._num_blocks, self._slots.num_slots)
        job = Job(0, True, [0] * num_blocks, list(range(num_blocks)))
        for _ in range(2):
            flight = self._store(Piece(job, 0, num_blocks), self._buffers[0], self._gathers)
            flight.done.synchronize()
        seconds = max(self._device.seconds(flight.begun, flight.done), 1e-9)
        return num_blocks * self._slots.slot_bytes / seconds

    # The worker's main thread

    def begin_step(self, orders: Orders) -> None:
        """Take the orders. What the calling thread queues on the compute stream from here on may
        overwrite the blocks of jobs that were dropped or are waited for. The host waits for
        nothing."""
        if not (orders.jobs or orders.moves or orders.drop or orders.wait):
            return
        compute = self._device.compute_stream()
        with self._lock:
            self.queue.take(orders, after=compute.record() if orders.jobs else None)
            if orders.wait:
                self._release(set(orders.wait), compute)

    def _release(self, numbers: set[int], compute: Stream[Any]) -> None:
        before = compute.record()
        num_issued = 0
        while (work := self.queue.next(self._num_blocks, urgent_only=True)) is not None:
            self._carry_out(work, gathers=compute)
            num_issued += 1
        held = [f for f in self._in_flight if f.piece.job.number in numbers]
        held = [flight for flight in held if not flight.released.query()]
        for flight in held:
            compute.wait(flight.released)
        if num_issued or held:
            self._waits.append((before, compute.record()))

    def report(self) -> Report | None:
        with self._lock:
            self._retire()
            while self._waits and self._waits[0][1].query():
                self.queue.waited(self._device.seconds(*self._waits.popleft()))
            return self.queue.take_report()

    def settle(self) -> None:
        """Let the host wait until all that is queued has been copied."""
        while self.queue.has_work():
            if not self.pump():
                self.wait_for_room()
        with self._lock:
            self._gathers.synchronize()
            self._copies.synchronize()
            self._retire()

    def close(self) -> None:
        self._gathers.synchronize()
        self._copies.synchronize()
        self._buffers.clear()

    # The thread beside it

    def prepare_thread(self) -> None:
        """Call first."""
        self._device.prepare_thread()

    def pump(self) -> bool:
        """Queue one piece, or do a step's moves. False where there is nothing to do, or no staging
        buffer is free."""
        with self._lock:
            self._retire()
            if not self._buffers[0].is_free:
                return False
            work = self.queue.next(self._num_blocks)
            if work is not None:
                self._carry_out(work, gathers=self._gathers)
            return work is not None

    def wait_for_room(self) -> None:
        """Until a staging buffer is free."""
        done = self._buffers[0].done
        if done is not None:
            done.synchronize()

    # One piece

    def _carry_out(self, work: Piece | Moves, gathers: Stream[Any]) -> None:
        if isinstance(work, Moves):
            # Their slots are in nobody's use: both ends are the host's business alone.
            self.queue.moved(self._slots.move(work.moves))
            return
        try:
            self._queue_piece(work, gathers)
        except FAULTS as error:
            what = "copying KV to the host" if work.job.store else "copying KV back"
            slots = [error.slot] if isinstance(error, DiskError) else work.slots
            failed = {self._slots.failed(slot, what, error) for slot in slots}
            self.queue.done(work, failed, 0.0)

    def _queue_piece(self, piece: Piece, gathers: Stream[Any]) -> None:
        torn = set() if piece.job.store else self._torn(piece.slots)
        if torn:
            self.queue.done(piece, torn, 0.0)
            return
        self._buffers.rotate(-1)
        buffer = self._buffers[-1]
        flight = (self._store if piece.job.store else self._load)(piece, buffer, gathers)
        buffer.done = flight.done
        self._in_flight.append(flight)

    def _store(self, piece: Piece, buffer: _Buffer, gathers: Stream[Any]) -> _Flight:
        to_slots = self._between(piece.slots, buffer.rows, outward=True)
        if piece.after is not None:
            gathers.wait(piece.after)
        if buffer.done is not None:
            gathers.wait(buffer.done)
        blocks, rows = piece.block_ids, buffer.rows
        gathers.submit(lambda: self._rows.gather(blocks, rows))
        released = gathers.record()
        copies = self._copies
        copies.wait(released)
        begun = copies.record()
        copies.submit(to_slots)
        return _Flight(piece, released, begun, copies.record())

    def _load(self, piece: Piece, buffer: _Buffer, gathers: Stream[Any]) -> _Flight:
        from_slots = self._between(piece.slots, buffer.rows, outward=False)
        copies = self._copies
        if piece.after is not None:
            copies.wait(piece.after)
        begun = copies.record()
        # The buffer's last user is before us on the same stream.
        copies.submit(from_slots)
        blocks, rows = piece.block_ids, buffer.rows
        copies.submit(lambda: self._rows.scatter(rows[: len(blocks)], blocks))
        done = copies.record()
        return _Flight(piece, done, begun, done)

    def _between(
        self, slots: Sequence[int], rows: torch.Tensor, *, outward: bool
    ) -> Callable[[], None]:
        """The copy between a staging buffer and slots, in as few stretches as they make up."""
        bytes_of = self._slots.bytes_of if outward else self._slots.to_read
        pairs = [
            (rows[first : first + length].flatten(), bytes_of(slot, length))
            for first, slot, length in self._stretches(slots)
        ]

        def copy() -> None:
            for staged, kept in pairs:
                to, source = (kept, staged) if outward else (staged, kept)
                to.copy_(source, non_blocking=True)

        return copy

    def _stretches(self, slots: Sequence[int]) -> list[tuple[int, int, int]]:
        """(index of the first, its slot, how many) of slots that may be copied as one."""
        found = []
        key: Callable[[tuple[int, int]], object]
        key = lambda at: (at[1] - at[0], self._slots.section_of(at[1]))  # noqa: E731
        for _, run in groupby(enumerate(slots), key):
            members = list(run)
            found.append((*members[0], len(members)))
        return found

    # Its end

    def _retire(self) -> None:
        while self._in_flight and self._in_flight[0].done.query():
            piece, _, begun, done = self._in_flight.popleft()
            if piece.job.store:
                for slot in piece.slots:
                    self._slots.written(slot)
            self.queue.done(piece, set(), self._device.seconds(begun, done))

    def _torn(self, slots: Sequence[int]) -> set[int]:
        """Those whose bytes are not what was written, where that is looked after."""
        if not self._slots.has_checksums:
            return set()
        self._copies.synchronize()
        self._retire()
        return {slot for slot in slots if not self._slots.is_intact(slot)}
