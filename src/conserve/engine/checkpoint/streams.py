"""Carries out the scheduler's copy orders beside the forwards of a device with streams.

    to the host    the blocks of a flight are gathered into a staging buffer on the device by one
                   kernel, and the buffer is copied to the slots in bulk
    and back       slots to a staging buffer in bulk, which one kernel scatters

A flight is as many pieces of jobs in one direction as one buffer holds.

    stream     what runs on it, in order
    compute    forwards; gathers that the next forward waits for
    gathers    all other gathers
    copies     buffers to slots, slots to buffers, scatters

What one stream does is ordered after another's by these events only:

    after      on compute, when a job was ordered: its blocks hold what is to be copied, and
               nobody reads the blocks that are to be filled any more
    released   a flight's blocks are not touched any more: gathered, or scattered into. A forward
               that may overwrite blocks waits for this: for a gather, which needs a free buffer and
               never the link; or for a load that was on the streams when it was dropped
    done       a flight's slots are whole, or read, and its buffer is free
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from conserve.engine.checkpoint.bulk import Stretch, copying, stretches_of
from conserve.engine.checkpoint.copy_queue import CopyQueue
from conserve.engine.checkpoint.device import Device, Event, Stream
from conserve.engine.checkpoint.orders import Job, Orders, Report
from conserve.engine.checkpoint.pieces import Batch, Moves, Piece
from conserve.engine.checkpoint.rows import BlockRows
from conserve.engine.checkpoint.slots import FAULTS, DiskError, HostSlots
from conserve.engine.checkpoint.staging import Buffer, Staging


class _Flight(NamedTuple):
    """What is queued on the streams in one go."""

    batch: Batch
    released: Event
    begun: Event
    done: Event


class StreamCopies:
    """Queues copies on the streams, as many as there are staging buffers, and sees them end.

    `begin_step`, `report` and `settle` are called by the worker's main thread, `pump` and
    `wait_for_room` by one thread that keeps the streams busy between steps.
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
        self._staging = Staging(staging)
        self._in_flight: deque[_Flight] = deque()
        self._unsealed: deque[_Flight] = deque()
        """To the host and done, but for the checksums of their slots."""
        self._waits: deque[tuple[Event, Event]] = deque()
        self._lock = threading.RLock()
        self._pumping = threading.Lock()
        """Held by whoever has taken work from the queue that is not on the streams yet."""

    def measure(self) -> float:
        """Bytes a second from a staging buffer to slots. They hold nothing yet."""
        num_blocks = min(self._staging.num_blocks, self._slots.num_slots)
        job = Job(0, True, [0] * num_blocks, list(range(num_blocks)))
        slots = stretches_of(self._slots, job.slots, outward=True)
        batch, buffer = Batch([Piece(job, 0, num_blocks)]), self._staging.take()
        for _ in range(2):
            flight = self._store(batch, buffer, slots, self._gathers)
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
        num_issued, num_blocks = 0, self._staging.num_blocks
        while any(work := self.queue.next_batch(num_blocks, urgent_only=True)):
            self._carry_out(work, compute, self._staging.take_urgently)
            num_issued += 1
        held = [f for f in self._in_flight if any(p.job.number in numbers for p in f.batch.pieces)]
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
        with self._pumping, self._lock:
            self._gathers.synchronize()
            self._copies.synchronize()
            self._retire()

    def close(self) -> None:
        """Wait for what is queued, and forget the buffers. Nobody may call anything any more."""
        self._gathers.synchronize()
        self._copies.synchronize()
        self._staging.close()

    # The thread beside it

    def prepare_thread(self) -> None:
        """Call first."""
        self._device.prepare_thread()

    def has_work(self) -> bool:
        return self.queue.has_work() or bool(self._unsealed)

    def pump(self) -> bool:
        """Queue what fills a buffer, or do a step's moves. False where there is nothing to do, or
        no staging buffer is free."""
        with self._pumping:
            self._seal()
            with self._lock:
                self._retire()
                if not self._staging.has_room:
                    return False
                work = self.queue.next_batch(self._staging.num_blocks)
                if isinstance(work, Moves) or not self._is_looked_at(work):
                    self._carry_out(work, self._gathers, self._staging.take)
                    return any(work)
            # Which takes long, and the main thread waits for the lock.
            found = [(piece, self._look(piece)) for piece in work.pieces]
            with self._lock:
                for piece, at in found:
                    self._load_found(piece, at)
            return True

    def wait_for_room(self) -> None:
        """Until a staging buffer is free."""
        room = self._staging.room()
        if room is not None:
            room.synchronize()

    # One flight

    def _carry_out(
        self, work: Moves | Batch, gathers: Stream[Any], take: Callable[[], Buffer]
    ) -> None:
        if isinstance(work, Moves):
            # Their slots are in nobody's use: both ends are the host's business alone.
            self.queue.moved(self._slots.move(work.moves))
        elif work.pieces:
            self._send_off(work, gathers, take)

    def _send_off(
        self,
        batch: Batch,
        gathers: Stream[Any],
        take: Callable[[], Buffer],
        found: Sequence[Stretch] | None = None,
    ) -> None:
        """found: the slots' bytes, if it is known already where they are."""
        buffer = take()
        try:
            if found is None:
                found = stretches_of(self._slots, batch.slots, outward=batch.store)
            queue_it = self._store if batch.store else self._load
            flight = queue_it(batch, buffer, found, gathers)
        except FAULTS as error:
            if len(batch.pieces) == 1:
                (piece,) = batch.pieces
                self.queue.done(piece, self._failed(piece, error), 0.0)
                return
            for piece in batch.pieces:  # one of them cannot be copied, and the others can
                self._send_off(Batch([piece]), gathers, take)
            return
        buffer.done = flight.done
        self._in_flight.append(flight)

    def _failed(self, piece: Piece, error: Exception) -> set[int]:
        what = "copying KV to the host" if piece.job.store else "copying KV back"
        slots = [error.slot] if isinstance(error, DiskError) else piece.slots
        return {self._slots.failed(slot, what, error) for slot in slots}

    def _store(
        self, batch: Batch, buffer: Buffer, slots: Sequence[Stretch], gathers: Stream[Any]
    ) -> _Flight:
        rows, blocks = buffer.rows, batch.block_ids
        for after in batch.afters:
            gathers.wait(after)
        if buffer.done is not None:
            gathers.wait(buffer.done)
        gathers.submit(lambda: self._rows.gather(blocks, rows))
        released = gathers.record()
        copies = self._copies
        copies.wait(released)
        begun = copies.record()
        copies.submit(copying(rows, slots, outward=True))
        return _Flight(batch, released, begun, copies.record())

    def _load(
        self, batch: Batch, buffer: Buffer, slots: Sequence[Stretch], gathers: Stream[Any]
    ) -> _Flight:
        rows, blocks, copies = buffer.rows, batch.block_ids, self._copies
        for after in batch.afters:
            copies.wait(after)
        begun = copies.record()
        # The buffer's last user is before us on the same stream.
        copies.submit(copying(rows, slots, outward=False))
        copies.submit(lambda: self._rows.scatter(rows[: len(blocks)], blocks))
        done = copies.record()
        return _Flight(batch, done, begun, done)

    # Its end

    def _retire(self) -> None:
        while self._in_flight and self._in_flight[0].done.query():
            flight = self._in_flight.popleft()
            if self._slots.has_checksums and flight.batch.store:
                self._unsealed.append(flight)
                self.queue.wake()
            else:
                self._end(flight)

    def _end(self, flight: _Flight) -> None:
        seconds = self._device.seconds(flight.begun, flight.done) / len(flight.batch.slots)
        for piece in flight.batch.pieces:
            self.queue.done(piece, set(), seconds * len(piece.slots))

    # What takes long on the host: checksums, where they are kept, and disks

    def _seal(self) -> None:
        """Slots that are whole are to be found as they are. They are nobody else's until their
        jobs have ended, so nobody waits for this."""
        while self._unsealed:
            for slot in self._unsealed[0].batch.slots:
                self._slots.written(slot)
            with self._lock:
                self._end(self._unsealed.popleft())

    def _is_looked_at(self, batch: Batch) -> bool:
        """Whether these are loads out of slots that cannot be copied as they lie there."""
        in_memory = all(slot < self._slots.num_slots for slot in batch.slots)
        return not batch.store and (self._slots.has_checksums or not in_memory)

    def _look(self, piece: Piece) -> list[Stretch] | set[int]:
        """Where the bytes of a load are, or the slots that failed."""
        try:
            torn = self._torn(piece.slots)
            return torn or stretches_of(self._slots, piece.slots, outward=False)
        except FAULTS as error:
            return self._failed(piece, error)

    def _torn(self, slots: Sequence[int]) -> set[int]:
        """Those whose bytes are not what was written. Their copies to the host come before."""
        if not self._slots.has_checksums:
            return set()
        self._copies.synchronize()
        with self._lock:
            self._retire()
        self._seal()
        return {slot for slot in slots if not self._slots.is_intact(slot)}

    def _load_found(self, piece: Piece, found: list[Stretch] | set[int]) -> None:
        """What has been dropped meanwhile is not begun: its blocks may be others'."""
        if self.queue.put_back_if_dropped(piece):
            return
        if isinstance(found, set):
            self.queue.done(piece, found, 0.0)
        else:
            self._send_off(Batch([piece]), self._gathers, self._staging.take, found)
