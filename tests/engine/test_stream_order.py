"""P2, P3, P4 on a device that keeps CUDA's order of things and no other (`stream_device.py`).

The copies are the real ones (`streams.py`), under the real scheduler, beside forwards, bursts,
restores, stops and cancellations.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from errno import EIO
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine.checkpoint import staging
from conserve.engine.checkpoint.disk import SlotFile
from conserve.engine.checkpoint.orders import Orders
from conserve.engine.checkpoint.streams import StreamCopies
from conserve.engine.checkpoint.workers import CheckpointWorker
from conserve.engine.connector import ConserveConnector
from conserve.engine.settings import EngineSettings
from tests.engine.copies import hashes_of, rank_is_ready
from tests.engine.device import StaleReadError
from tests.engine.engine import BLOCK_SIZE, make_scheduler
from tests.engine.stream_device import StandInEvent, StandInStream
from tests.engine.streamed import NUM_LAYERS, AheadEngine, StandInMark, StreamedDevice
from tests.engine.test_checkpoints import FAST, SLOT_BYTES, run_bursts, totals_of

pytestmark = pytest.mark.engine

MakeEngine = Callable[..., AheadEngine]
BLOCK_BYTES = NUM_LAYERS * BLOCK_SIZE * 8


@pytest.fixture
def make_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make(
        depth: int = 2,
        *,
        seed: int = 1,
        blocks_a_piece: int = 2,
        mode: str = "incremental",
        num_slots: int = 512,
        num_disk_slots: int = 0,
        checksums: bool = False,
        **options: Any,
    ) -> AheadEngine:
        monkeypatch.setattr(staging, "BUFFER_BYTES", blocks_a_piece * BLOCK_BYTES)
        settings = EngineSettings(
            profile_seconds=0,
            checkpoint=mode,
            checkpoint_bytes=num_slots * SLOT_BYTES,
            checkpoint_dir=str(tmp_path) if num_disk_slots else "",
            checkpoint_dir_bytes=num_disk_slots * SLOT_BYTES,
            checkpoint_bytes_per_s=FAST,
        )
        scheduler = make_scheduler(
            tmp_path, settings=settings, async_scheduling=depth > 1, num_blocks=26, **options
        )
        made.append(scheduler)
        chance = random.Random(seed)
        device = StreamedDevice(26, depth, chance)
        make_file = partial(SlotFile, tmp_path, num_disk_slots) if num_disk_slots else None
        worker = worker_half(scheduler)
        device.give_copies(worker, num_slots, make_file, checksums=checksums)
        engine = AheadEngine(scheduler, device, depth=depth)
        engine.stop_layer = lambda: chance.randrange(NUM_LAYERS)
        return engine

    yield make
    for scheduler in made:
        scheduler.shutdown()


def worker_half(scheduler: Any) -> ConserveConnector:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    rank_is_ready(scheduler)
    return ConserveConnector(
        scheduler.vllm_config, KVConnectorRole.WORKER, scheduler.kv_cache_config
    )


def stop_some(engine: AheadEngine, seed: int) -> None:
    chance = random.Random(seed)
    engine.stop = lambda step: chance.random() < 0.4


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(6))
def test_displaced_requests_come_back_as_they_were(
    make_engine: MakeEngine, depth: int, seed: int
) -> None:
    engine = make_engine(depth, seed=seed, blocks_a_piece=1 + seed % 4)
    totals = totals_of(engine)
    run_bursts(engine, seed)
    assert totals["displaced_requests"] > 0
    assert totals["restored_tokens memory"] > 0


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("shared", [0, 13], ids=["distinct", "shared-prefix"])
@pytest.mark.parametrize("seed", range(6))
def test_stops_and_cancels_beside_copies(
    make_engine: MakeEngine, depth: int, shared: int, seed: int
) -> None:
    engine = make_engine(depth, seed=seed, blocks_a_piece=1 + seed % 4)
    # As where the worker is in the engine's process: plans are put off, and their copies are not.
    engine.scheduler.driver.dispatch_blocks = seed % 2 == 1
    stop_some(engine, seed)
    run_bursts(engine, seed, shared=shared, cancel=True)
    assert engine.num_stops > 0


@pytest.mark.parametrize("seed", range(3))
def test_whole_requests_are_copied_when_they_are_displaced(
    make_engine: MakeEngine, seed: int
) -> None:
    """More than all staging buffers hold, and the forward right behind."""
    engine = make_engine(seed=seed, mode="swap", blocks_a_piece=1)
    totals = totals_of(engine)
    run_bursts(engine, seed)
    assert totals["restored_tokens memory"] > 0


@pytest.mark.parametrize("num_disk_slots", [0, 200])
def test_a_small_pool_keeps_some_and_a_disk_more(
    make_engine: MakeEngine, num_disk_slots: int
) -> None:
    """Slots move to the disk at once, while copies are on the streams, and are filled again."""
    seen: Counter[str] = Counter()
    for seed in range(6):
        engine = make_engine(seed=seed, num_slots=6, num_disk_slots=num_disk_slots)
        totals = totals_of(engine)
        run_bursts(engine, seed)
        seen.update(name for name, total in totals.items() if total)
    assert seen["restored_tokens memory"]
    if num_disk_slots:
        assert seen["checkpoint_evictions demoted"]
        assert seen["restored_tokens disk"]


@pytest.mark.parametrize("fails", ["read", "write"])
def test_a_disk_that_fails_makes_requests_compute_again(
    make_engine: MakeEngine, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(seed=3, num_slots=6, num_disk_slots=200)
    totals = totals_of(engine)
    monkeypatch.setattr(SlotFile, fails, cannot)
    run_bursts(engine, 3)
    assert totals[f"checkpoint_faults {'load' if fails == 'read' else 'move'}"] > 0


def cannot(*_: Any) -> None:
    raise OSError(EIO, os.strerror(EIO))


@pytest.mark.parametrize("seed", range(4))
def test_checksums_fit_whatever_goes_on_beside(make_engine: MakeEngine, seed: int) -> None:
    """Taken late, and looked at while others are copied, stopped and dropped."""
    engine = make_engine(seed=seed, checksums=True)
    stop_some(engine, seed)
    totals = totals_of(engine)
    run_bursts(engine, seed, shared=(seed % 2) * 13, cancel=True)
    assert totals["restored_tokens memory"] > 0
    assert not any("faults" in name for name in totals)


def fail_midway(engine: AheadEngine, number: int) -> None:
    """The thread that pumps fails, with a load on the streams."""
    copies = engine.device.copies
    begin_step = copies.begin_step

    def begin(orders: Orders) -> None:
        begin_step(orders)
        if any(not job.store and job.number > number for job in orders.jobs):
            copies.pump()
            copies.queue.give_up("its thread has failed")

    copies.begin_step = begin


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(4))
def test_a_thread_that_fails_leaves_nobody_waiting_and_no_copy_going_on(
    make_engine: MakeEngine, depth: int, seed: int
) -> None:
    engine = make_engine(depth, seed=seed)
    fail_midway(engine, 10 + 5 * seed)
    run_bursts(engine, seed)
    assert engine.scheduler.checkpointer.unusable == "its thread has failed"
    assert not engine.device.copies._in_flight or not any(
        stream.queue for stream in engine.device.streams.streams[1:]
    )


# Negative controls


def forget_waits_on(name: str) -> Callable[[AheadEngine, pytest.MonkeyPatch], None]:
    def forget(engine: AheadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        engine.device.streams.forgets.add(name)

    return forget


def gather_beside_the_forward(engine: AheadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies that a forward waits for are on the wrong stream."""
    real = StreamCopies._carry_out

    def carry_out(self: StreamCopies, work: Any, gathers: Any, take: Any) -> None:
        real(self, work, self._gathers, take)

    def release(self: StreamCopies, numbers: set[int], compute: Any) -> None:
        while any(work := self.queue.next_batch(self._staging.num_blocks, urgent_only=True)):
            self._carry_out(work, compute, self._staging.take_urgently)

    monkeypatch.setattr(StreamCopies, "_carry_out", carry_out)
    monkeypatch.setattr(StreamCopies, "_release", release)


def scatter_beside_the_copy(engine: AheadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load's blocks are filled on another stream than the one that fills its buffer."""
    copies = engine.device.copies
    submit = StandInStream.submit

    def elsewhere(self: StandInStream, work: Any) -> None:
        scatters = "scatter" in getattr(work, "__code__", work).co_names
        submit(copies._gathers if scatters else self, work)

    monkeypatch.setattr(StandInStream, "submit", elsewhere)


def say_done_early(engine: AheadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies count as done when they are queued."""
    monkeypatch.setattr(StandInEvent, "query", lambda self: True)
    monkeypatch.setattr(StandInStream, "can_go_on", _can_go_on)
    monkeypatch.setattr(engine.device.streams, "seconds", lambda begun, done: 1.0)


def _can_go_on(self: StandInStream) -> bool:
    head = self.queue[0] if self.queue else None
    return head is not None and not (
        isinstance(head, tuple) and head[0] == "wait" and not head[1].passed_at
    )


def resolve_stopped_steps_early(engine: AheadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandInMark, "wait", lambda self: None)


def give_nothing_back(engine: AheadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thread that has failed left on the streams goes on, whoever has the blocks, when the
    link comes to it."""
    fail_midway(engine, 10)
    monkeypatch.setattr(CheckpointWorker, "close", lambda self: None)
    copies, num_looks = engine.device.copies, itertools.count()
    can_go_on = StandInStream.can_go_on

    def late(self: StandInStream) -> bool:
        waits = self is copies._copies and copies.queue.is_given_up and next(num_looks) < 200
        return can_go_on(self) and not waits

    monkeypatch.setattr(StandInStream, "can_go_on", late)


@pytest.mark.parametrize(
    "careless",
    [
        give_nothing_back,
        pytest.param(forget_waits_on("compute"), id="forwards wait for no gather"),
        pytest.param(forget_waits_on("gathers"), id="gathers wait for no forward and no buffer"),
        pytest.param(forget_waits_on("copies"), id="copies wait for no gather"),
        gather_beside_the_forward,
        scatter_beside_the_copy,
        say_done_early,
        resolve_stopped_steps_early,
    ],
)
def test_a_careless_order_is_caught(
    make_engine: MakeEngine, careless: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_some() -> None:
        for seed in range(40):
            engine = make_engine(seed=seed)
            stop_some(engine, seed)
            with monkeypatch.context() as patch:
                careless(engine, patch)
                run_bursts(engine, seed)

    with pytest.raises(StaleReadError):
        run_some()


def test_hashes_are_those_of_the_pretend_device() -> None:
    """What the tensors hold is what the other tests' device compares with."""
    from tests.engine.device import Row

    row = Row([3, 5, 8], [])
    assert [row.hash_at(i) for i in range(3)] == hashes_of([3, 5, 8])
