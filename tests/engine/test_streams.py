"""Copies of a device with streams, piece by piece: what waits for what, and what for nothing."""

from __future__ import annotations

import random
import threading
from collections import deque
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch

from conserve.engine.checkpoint import staging
from conserve.engine.checkpoint.bulk import stretches_of
from conserve.engine.checkpoint.copier import StreamCopier
from conserve.engine.checkpoint.copy_queue import CopyQueue
from conserve.engine.checkpoint.disk import SlotFile
from conserve.engine.checkpoint.orders import Ended, Job, Orders, Report
from conserve.engine.checkpoint.pieces import Piece
from conserve.engine.checkpoint.rows import BlockRows
from conserve.engine.checkpoint.slots import HostSlots
from conserve.engine.checkpoint.staging import staging_buffers
from conserve.engine.checkpoint.streams import StreamCopies
from tests.engine.stream_device import StandInDevice

pytestmark = pytest.mark.engine

NUM_BLOCKS, NUM_SLOTS, CONTENT = 64, 64, 8
SLOT_BYTES = 2 * CONTENT
"""Of two layers."""
BLOCKS_A_PIECE = 4
LONG_S = 30.0
"""No test waits as long unless it fails."""


class World:
    """KV in which every byte of block b is b, slots that hold -1, and the copies between them."""

    def __init__(
        self, checksums: bool = False, slots_per_section: int = 0, file: SlotFile | None = None
    ) -> None:
        kv = torch.zeros((2, NUM_BLOCKS, 1, 1, CONTENT), dtype=torch.int8)
        kv += torch.arange(NUM_BLOCKS, dtype=torch.int8).view(1, -1, 1, 1, 1)
        self.kv = kv
        memory = torch.full((NUM_SLOTS * SLOT_BYTES,), -1, dtype=torch.int8)
        self.slots = HostSlots(
            memory, SLOT_BYTES, file, checksums=checksums, slots_per_section=slots_per_section
        )
        self.device = StandInDevice(random.Random(3))
        buffers = staging_buffers(self.device, SLOT_BYTES)
        rows, queue = BlockRows(list(kv)), CopyQueue(SLOT_BYTES)
        self.copies = StreamCopies(queue, rows, self.slots, self.device, buffers)

    def slot(self, number: int) -> set[int]:
        return set(self.slots.bytes_of(number).tolist())

    def block(self, number: int) -> set[int]:
        return set(self.kv[:, number].flatten().tolist())

    def overwrite(self, *blocks: int) -> None:
        """What a forward does, in its turn."""
        self.device.compute.submit(lambda: self.kv.index_fill_(1, torch.tensor(blocks), 99))

    def run_compute(self) -> None:
        """The device works at nothing else, as far as it may."""
        compute = self.device.compute
        while compute.can_go_on():
            compute.go_on(1)

    def pump(self) -> None:
        while self.copies.pump():
            pass

    def finish(self) -> Report:
        busy = True
        while busy:
            busy = self.copies.pump() or self.copies.has_work()
            busy |= any(stream.queue for stream in self.device.streams)
            self.device.finish()
        report = self.copies.report()
        assert report is not None
        return report


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "BUFFER_BYTES", BLOCKS_A_PIECE * SLOT_BYTES)


def store(number: int, blocks: range, first_slot: int = 0) -> Job:
    return Job(number, True, list(blocks), list(range(first_slot, first_slot + len(blocks))))


def load(number: int, slots: range, first_block: int) -> Job:
    blocks = list(range(first_block, first_block + len(slots)))
    return Job(number, False, blocks, list(slots))


def test_blocks_go_out_and_come_back_elsewhere() -> None:
    world = World()
    world.copies.begin_step(Orders(jobs=[store(1, range(10, 20))]))
    world.copies.begin_step(Orders(jobs=[load(2, range(10), 40)]))
    report = world.finish()
    assert [world.slot(i) for i in range(11)] == [{10 + i} for i in range(10)] + [{-1}]
    assert [world.block(40 + i) for i in range(10)] == [{10 + i} for i in range(10)]
    assert report.ended[1].num_bytes == report.ended[2].num_bytes == 10 * SLOT_BYTES
    assert report.ended[1].seconds > 0


def test_slots_anywhere_and_sections_of_pinned_memory() -> None:
    world = World(slots_per_section=4)
    job = Job(1, True, [5, 6, 7, 8, 9, 4], [2, 3, 4, 5, 60, 61])
    world.copies.begin_step(Orders(jobs=[job]))
    found = stretches_of(world.slots, [2, 3, 4, 5, 60, 61, 9], outward=True)
    assert [(one.first, one.num_slots) for one in found] == [(0, 2), (2, 2), (4, 2), (6, 1)]
    world.finish()
    assert [world.slot(slot) for slot in job.slots] == [{5}, {6}, {7}, {8}, {9}, {4}]


def test_a_forward_waits_for_the_gather_only() -> None:
    """Nothing of the link has moved when the forward overwrites the block; the copy is right."""
    world = World()
    world.copies.begin_step(Orders(jobs=[store(1, range(10, 13))], wait=[1]))
    world.overwrite(10, 11, 12)
    world.run_compute()
    assert world.block(10) == {99}
    assert world.slot(0) == {-1}, "the copy to the host has not begun"
    world.finish()
    assert [world.slot(i) for i in range(3)] == [{10}, {11}, {12}]


def test_what_is_waited_for_overtakes_a_long_load() -> None:
    world = World()
    world.copies.begin_step(Orders(jobs=[load(1, range(40), 20)]))
    world.pump()
    world.copies.begin_step(Orders(jobs=[store(2, range(3), 50)], wait=[2]))
    world.overwrite(0, 1, 2)
    num_left = len(world.device.streams[2].queue)
    while world.block(0) != {99}:
        assert world.device.advance()
    assert len(world.copies.queue._others) == 1, "the load is not through"
    assert num_left > 0
    world.finish()
    assert [world.slot(50 + i) for i in range(3)] == [{0}, {1}, {2}]


def test_more_than_all_buffers_hold_can_be_waited_for() -> None:
    world = World()
    blocks = range(8 * BLOCKS_A_PIECE)
    world.copies.begin_step(Orders(jobs=[store(1, blocks)], wait=[1]))
    world.overwrite(*blocks)
    report = world.finish()
    assert [world.slot(i) for i in blocks] == [{i} for i in blocks]
    assert report.wait_s > 0


def keep_the_link_busy(world: World) -> None:
    """The buffers of the background are all on the link, which gets on with none of it."""
    world.copies.begin_step(Orders(jobs=[store(1, range(40))]))
    world.pump()
    while world.device.streams[1].can_go_on():
        world.device.streams[1].go_on(1)
    assert not world.copies._staging.has_room


def test_a_forward_waits_for_no_link_however_busy_it_is() -> None:
    """The last blocks of several requests that are displaced at once, in one kernel."""
    world = World()
    keep_the_link_busy(world)
    jobs = [store(10 + i, range(50 + i, 51 + i), 50 + i) for i in range(2 * BLOCKS_A_PIECE)]
    world.copies.begin_step(Orders(jobs=jobs, wait=[job.number for job in jobs]))
    world.overwrite(*range(50, 50 + len(jobs)))
    gathers = [op for op in world.device.compute.queue if not isinstance(op, tuple)]
    assert len(gathers) == 2 + 1, "what two buffers hold, and the forward"
    world.run_compute()
    assert world.block(50) == {99}
    assert world.slot(50) == {-1}, "nothing has been on the link"
    world.finish()
    assert [world.slot(50 + i) for i in range(len(jobs))] == [{50 + i} for i in range(len(jobs))]


def test_what_a_forward_waits_for_may_have_the_backgrounds_buffers_where_they_are_free() -> None:
    world = World()
    blocks = range(staging.NUM_BUFFERS * BLOCKS_A_PIECE)
    world.copies.begin_step(Orders(jobs=[store(1, blocks)], wait=[1]))
    world.overwrite(*blocks)
    world.run_compute()
    assert world.block(blocks[-1]) == {99}
    world.finish()
    assert [world.slot(i) for i in blocks] == [{i} for i in blocks]


def test_small_copies_of_several_requests_share_a_buffer() -> None:
    world = World()
    jobs = [store(i, range(i, i + 1), i) for i in range(1, 1 + BLOCKS_A_PIECE)]
    world.copies.begin_step(Orders(jobs=[*jobs, load(20, range(30, 32), 40)]))
    assert world.copies.pump()
    assert len(world.device.streams[1].queue) > 0
    assert world.copies.queue._others == deque([20]), "the other way round goes by itself"
    report = world.finish()
    assert set(report.ended) == {*range(1, 1 + BLOCKS_A_PIECE), 20}
    assert [world.slot(i) for i in range(1, 5)] == [{i} for i in range(1, 5)]


def test_a_dropped_job_that_has_not_begun_is_over_at_once_and_nobody_waits() -> None:
    world = World()
    world.copies.begin_step(Orders(jobs=[load(1, range(40), 20), store(2, range(4), 50)]))
    world.pump()
    world.copies.begin_step(Orders(drop=[2], wait=[2]))
    assert not any(isinstance(op, tuple) and op[0] == "wait" for op in world.device.compute.queue)
    report = world.copies.report()
    assert report is not None
    assert report.ended == {2: Ended(dropped=True)}
    world.finish()
    assert world.slot(50) == {-1}


def test_a_dropped_job_that_has_begun_lets_go_of_its_blocks_first() -> None:
    world = World()
    world.copies.begin_step(Orders(jobs=[store(1, range(8 * BLOCKS_A_PIECE))]))
    world.pump()
    world.copies.begin_step(Orders(drop=[1], wait=[1]))
    assert world.copies.report() is None, "its pieces are on the streams"
    world.overwrite(*range(8 * BLOCKS_A_PIECE))
    report = world.finish()
    assert report.ended[1].dropped
    begun = (staging.NUM_BUFFERS - staging.NUM_RESERVED) * BLOCKS_A_PIECE
    assert report.ended[1].num_bytes == begun * SLOT_BYTES
    assert [world.slot(i) for i in range(begun + 1)] == [{i} for i in range(begun)] + [{-1}]


def test_a_copy_begins_after_the_forward_that_fills_its_blocks() -> None:
    world = World()
    world.overwrite(10)
    world.copies.begin_step(Orders(jobs=[store(1, range(10, 11))]))
    world.pump()
    while world.device.streams[1].can_go_on():
        world.device.streams[1].go_on(1)
    assert world.slot(0) == {-1}
    world.finish()
    assert world.slot(0) == {99}


def test_steps_without_orders_queue_nothing() -> None:
    world = World()
    world.copies.begin_step(Orders(num_slots=4))
    assert not any(stream.queue for stream in world.device.streams)
    assert world.copies.report() is None


def test_what_the_host_does_does_not_grow_with_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with blocks, but for the slots that do not follow each other."""
    counts = []
    for num_layers in (2, 32):
        device = StandInDevice(random.Random(3))
        kv = torch.zeros((num_layers, NUM_BLOCKS, 2, 4, CONTENT))
        rows = BlockRows(list(kv))
        monkeypatch.setattr(staging, "BUFFER_BYTES", 16 * rows.slot_bytes)
        slots = HostSlots(torch.zeros(16 * rows.slot_bytes, dtype=torch.int8), rows.slot_bytes)
        buffers = staging_buffers(device, rows.slot_bytes)
        copies = StreamCopies(CopyQueue(), rows, slots, device, buffers)
        copies.begin_step(Orders(jobs=[store(1, range(16))]))
        assert copies.pump()
        with torch.profiler.profile() as seen:
            device.finish()
        counts.append(sum(event.count for event in seen.key_averages()))
    assert counts[0] == counts[1]


def test_blocks_and_slots_that_there_are_not_fail_and_the_others_go_on() -> None:
    world = World()
    jobs = [store(1, range(3), NUM_SLOTS - 1), store(2, range(3))]
    world.copies.begin_step(Orders(jobs=jobs))
    report = world.finish()
    assert report.ended[1].failed_slots == {NUM_SLOTS - 1, NUM_SLOTS, NUM_SLOTS + 1}
    assert not report.ended[2].failed_slots
    assert world.slot(0) == {0}


def test_a_slot_that_was_tampered_with_is_noticed() -> None:
    world = World(checksums=True)
    world.copies.begin_step(Orders(jobs=[store(1, range(10, 13))]))
    world.finish()
    world.slots.bytes_of(1)[3] = 7
    world.copies.begin_step(Orders(jobs=[load(2, range(3), 40)]))
    report = world.finish()
    assert report.ended[2].failed_slots == {1}


class Looked(threading.Event):
    """In place of a look at checksums, which takes as long as the test wants."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.begun = threading.Event()
        self._written, self._is_intact = world.slots.written, world.slots.is_intact
        world.slots.written = self.written  # type: ignore[method-assign]
        world.slots.is_intact = self.is_intact  # type: ignore[method-assign]

    def written(self, slot: int) -> None:
        self._look()
        self._written(slot)

    def is_intact(self, slot: int) -> bool:
        self._look()
        return self._is_intact(slot)

    def _look(self) -> None:
        self.begun.set()
        assert self.wait(LONG_S)


@pytest.mark.parametrize("direction", ["to the host", "back"])
def test_nobody_waits_for_checksums(direction: str) -> None:
    """Neither orders nor reports of the main thread."""
    world = World(checksums=True)
    world.copies.begin_step(Orders(jobs=[store(1, range(10, 12))]))
    if direction == "back":
        world.finish()
        world.copies.begin_step(Orders(jobs=[load(2, range(2), 40)]))
    else:
        world.pump()
        world.device.finish()
        assert world.copies.report() is None, "not before its checksums are there"
    look = Looked(world)
    thread = threading.Thread(target=world.pump)
    thread.start()
    assert look.begun.wait(LONG_S)

    def next_step() -> None:
        world.copies.begin_step(Orders(drop=[2], wait=[2]))
        world.copies.report()

    main = threading.Thread(target=next_step, daemon=True)
    main.start()
    main.join(LONG_S)
    assert not main.is_alive(), "it waits for the thread that looks at checksums"
    look.set()
    thread.join(LONG_S)
    world.overwrite(40, 41)
    world.device.finish()
    world.pump()
    assert world.block(40) == {99}, "a load that was dropped meanwhile has begun"
    assert [world.slot(i) for i in range(2)] == [{10}, {11}]


def test_nobody_waits_for_a_disk_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(file=SlotFile(tmp_path, 4, SLOT_BYTES))
    world.copies.begin_step(Orders(jobs=[store(1, range(10, 12))]))
    world.finish()
    world.copies.begin_step(Orders(moves=[(0, NUM_SLOTS), (1, NUM_SLOTS + 1)]))
    world.pump()
    begun, go_on, read = threading.Event(), threading.Event(), SlotFile.read

    def read_slowly(self: SlotFile, number: int, slot: torch.Tensor) -> None:
        begun.set()
        assert go_on.wait(LONG_S)
        read(self, number, slot)

    monkeypatch.setattr(SlotFile, "read", read_slowly)
    world.copies.begin_step(Orders(jobs=[load(2, range(NUM_SLOTS, NUM_SLOTS + 2), 40)]))
    thread = threading.Thread(target=world.pump)
    thread.start()
    assert begun.wait(LONG_S)
    urgent = Orders(jobs=[store(3, range(20, 21), 20)], wait=[3])
    main = threading.Thread(target=world.copies.begin_step, args=(urgent,), daemon=True)
    main.start()
    main.join(LONG_S)
    assert not main.is_alive(), "it waits for the thread that reads"
    go_on.set()
    thread.join(LONG_S)
    world.finish()
    assert [world.block(40), world.block(41), world.slot(20)] == [{10}, {11}, {20}]


def test_a_load_that_is_dropped_while_it_is_looked_at_is_over() -> None:
    world = World(checksums=True)
    world.copies.begin_step(Orders(jobs=[store(1, range(10, 12))]))
    world.finish()
    world.copies.begin_step(Orders(jobs=[load(2, range(2), 40)]))
    piece = world.copies.queue.next(BLOCKS_A_PIECE)
    assert isinstance(piece, Piece)
    world.copies.begin_step(Orders(drop=[2], wait=[2]))
    world.copies._load_found(piece, world.copies._look(piece))
    assert world.finish().ended == {2: Ended(dropped=True)}
    assert world.block(40) == {40}


class Turns:
    """In place of the lock for those that pump; says when somebody waits for it."""

    def __init__(self, *, careless: bool) -> None:
        self.wanted = threading.Event()
        self._lock, self._careless = threading.Lock(), careless

    def __enter__(self) -> None:
        if not self._careless and not self._lock.acquire(blocking=False):
            self.wanted.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        if not self._careless:
            self._lock.release()


def block_when_settled(*, careless: bool) -> set[int]:
    """What is in a block whose load the thread looks at, when the device is said to be idle."""
    world = World(checksums=True)
    world.copies._pumping = turns = Turns(careless=careless)  # type: ignore[assignment]
    world.copies.begin_step(Orders(jobs=[store(1, range(10, 12))]))
    world.finish()
    world.copies.begin_step(Orders(jobs=[load(2, range(2), 40)]))
    found: list[set[int]] = []
    look = Looked(world)
    thread = threading.Thread(target=world.pump)
    thread.start()
    assert look.begun.wait(LONG_S)

    def settle() -> None:
        world.copies.settle()
        found.append(world.block(40))
        turns.wanted.set()

    main = threading.Thread(target=settle, daemon=True)
    main.start()
    assert turns.wanted.wait(LONG_S)
    look.set()
    for one in (thread, main):
        one.join(LONG_S)
    return found[0]


def test_the_device_is_not_idle_while_the_thread_looks_at_a_load() -> None:
    assert block_when_settled(careless=False) == {10}


def test_a_device_that_is_called_idle_too_early_is_caught() -> None:
    assert block_when_settled(careless=True) == {40}


def test_slots_move_before_they_are_filled_again() -> None:
    world = World()
    world.copies.begin_step(Orders(jobs=[store(1, range(10, 12))]))
    world.finish()
    orders = Orders(moves=[(0, 30), (1, 31)], jobs=[store(2, range(20, 22))], wait=[2])
    world.copies.begin_step(orders)
    world.finish()
    assert [world.slot(slot) for slot in (30, 31, 0, 1)] == [{10}, {11}, {20}, {21}]


def test_the_link_is_measured() -> None:
    assert World().copies.measure() > 0


def test_the_thread_keeps_the_streams_busy_until_all_is_copied() -> None:
    """The device gets on whenever the thread waits for it."""
    world = World()
    copier = StreamCopier(world.copies)
    all_queued = threading.Event()
    pump = world.copies.pump

    def note() -> bool:
        pumped = pump()
        if not world.copies.queue.has_work():
            all_queued.set()
        return pumped

    world.copies.pump = note  # type: ignore[method-assign]
    copier.begin_step(Orders(jobs=[store(1, range(60)), store(2, range(4), 60)]))
    assert all_queued.wait(LONG_S)
    copier.close()
    assert [world.slot(i) for i in range(60)] == [{i} for i in range(60)]
