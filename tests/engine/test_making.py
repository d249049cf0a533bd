"""How a rank's pool comes to be: when vLLM has made its KV, beside what is timed, or not at all."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import re
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from conserve.engine.checkpoint import making, packing, pinned, workers
from conserve.engine.checkpoint.bandwidth import Bandwidth
from conserve.engine.checkpoint.bulk import stretches_of
from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.host_view import HostView
from conserve.engine.checkpoint.making import StreamMaking, packing_of_all, planes_of
from conserve.engine.checkpoint.orders import Job, Orders, Report
from conserve.engine.checkpoint.pinned import PinnedMemory
from conserve.engine.checkpoint.pool import HostPool
from conserve.engine.checkpoint.sizes import PoolSize
from conserve.engine.checkpoint.workers import CheckpointWorker
from conserve.engine.door import current_platform
from conserve.engine.settings import EngineSettings
from tests.engine.layers import CPU, attention_layer
from tests.engine.stream_device import StandInDevice

pytestmark = pytest.mark.engine

LONG_S = 30.0
"""No test waits as long unless it fails."""
NUM_SLOTS = 4
SIZE = PoolSize(NUM_SLOTS, slot_bytes=3 * 2 * 4 * 8 * 4)


def caches(num_blocks: int = 6) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    return {f"layers.{i}": torch.rand((num_blocks, 2, 4, 8), generator=chance) for i in range(3)}


def worker(kv_caches: dict[str, torch.Tensor], **settings: Any) -> CheckpointWorker:
    made = CheckpointWorker(EngineSettings(**settings), SIZE, num_blocks=6)
    made.register(kv_caches, {})
    return made


def store(number: int, block: int, slot: int) -> Job:
    return Job(number, True, [block], [slot])


def test_a_cpus_pool_is_reported_with_the_first_step() -> None:
    copies = worker(caches())
    assert copies.report() is None
    copies.begin_step(Orders())
    report = copies.report()
    assert report is not None
    assert report.pools == [NUM_SLOTS]
    assert report.bytes_per_s > 0, "measured at start"
    assert copies.report() is None
    copies.close()


def test_a_block_goes_out_and_comes_back_elsewhere() -> None:
    """Through the real store and thread, with KV as vLLM makes it: in inference mode."""
    with torch.inference_mode():
        kv = caches()
        wanted = {name: cache[2].clone() for name, cache in kv.items()}
        copies = worker(kv)
        copies.begin_step(Orders(num_slots=4, jobs=[store(1, 2, 3)], wait=[1]))
        for cache in kv.values():
            cache[2] = 0.0
    copies.begin_step(Orders(num_slots=4, jobs=[Job(2, False, [5], [3])], wait=[2]))
    assert all(torch.equal(kv[name][5], wanted[name]) for name in kv)
    made, report = copies.report(), copies.report()
    assert made is not None
    assert report is not None
    assert set(report.ended) == {1, 2}
    assert not any(ended.failed_slots for ended in report.ended.values())
    copies.close()


def test_a_worker_that_cannot_keep_anything_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room for the slots")

    monkeypatch.setattr(making, "SlotStore", SimpleNamespace(slot_bytes=lambda planes: 8))
    monkeypatch.setattr(workers, "CpuMaking", refuse)
    copies = worker(caches())
    report = copies.report()
    assert report is not None
    assert report.unusable == "no room for the slots"
    copies.begin_step(Orders(num_slots=4))
    assert copies.report() is None
    copies.close()


def test_kv_of_other_kinds_is_not_looked_at() -> None:
    """Recurrent layers register lists of tensors. The scheduler, which may have been told less of
    the layers, hears of it."""
    copies = CheckpointWorker(EngineSettings(), PoolSize(why_none="recurrent"), num_blocks=6)
    copies.register({"mamba": [torch.zeros(3)]}, {})
    copies.begin_step(Orders())
    report = copies.report()
    assert report is not None
    assert report.unusable == "recurrent"
    assert copies.report() is None
    copies.close()


# Pinned memory


class PretendPinning:
    """Pins a section whenever it may; writes down what is pinned."""

    def __init__(self, fails_at: int = -1) -> None:
        self.pinned: list[tuple[int, int]] = []
        self.may_pin = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self._fails_at = fails_at

    def prepare_thread(self) -> None:
        assert threading.current_thread().name in ("conserve-pinning", "conserve-copier")

    def pin(self, address: int, num_bytes: int) -> None:
        self.asked.release()
        assert self.may_pin.acquire(timeout=LONG_S)
        if len(self.pinned) == self._fails_at:
            raise MemoryError("the driver has had enough")
        self.pinned.append((address, num_bytes))

    def unpin(self, address: int) -> None:
        self.pinned.remove(next(one for one in self.pinned if one[0] == address))


class PinningDevice(PretendPinning, StandInDevice):
    """The stand-in, with memory to be pinned."""

    def __init__(self, fails_at: int = -1) -> None:
        PretendPinning.__init__(self, fails_at)
        StandInDevice.__init__(self, random.Random(1))

    def unpin(self, address: int) -> None:
        assert not any(stream.queue for stream in self.streams), "copies are under way"
        super().unpin(address)


@pytest.fixture(autouse=True)
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "SECTION_BYTES", 2 * mmap.PAGESIZE)


def made_ready(memory: PinnedMemory) -> PinnedMemory:
    memory._thread.join(LONG_S)
    assert memory.is_ready
    return memory


def test_memory_is_pinned_in_sections_of_whole_slots_and_pages() -> None:
    pinning = PretendPinning()
    pinning.may_pin.release(100)
    memory = made_ready(PinnedMemory(20, 1000, pinning))
    assert memory.slots_per_section * 1000 % mmap.PAGESIZE == 0
    assert len(memory.memory) == 20 * 1000
    ends = 0
    for address, num_bytes in pinning.pinned:
        assert address % mmap.PAGESIZE == num_bytes % mmap.PAGESIZE == 0
        assert address >= ends, "no page twice"
        ends = address + num_bytes
    assert ends >= memory.memory.data_ptr() + 20 * 1000
    memory.close()
    assert not pinning.pinned


def flags_of(address: int) -> list[str]:
    """What the kernel says of the mapping around an address."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(found[1], 16) <= address < int(found[2], 16)
        elif is_there and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no such mapping")


def test_a_child_that_is_forked_off_gets_none_of_it() -> None:
    """The kernel would copy all that is pinned, at once; or take it from the device."""
    pinning = PretendPinning()
    pinning.may_pin.release(100)
    memory = made_ready(PinnedMemory(8, mmap.PAGESIZE, pinning))
    assert "dc" in flags_of(memory.memory.data_ptr())  # don't copy
    memory.close()


def test_the_driver_finds_all_pages_there() -> None:
    """It keeps everybody waiting while it pins: also for those that it has to make."""
    found: list[int] = []

    class Looking(PretendPinning):
        def pin(self, address: int, num_bytes: int) -> None:
            super().pin(address, num_bytes)
            there = (ctypes.c_ubyte * (num_bytes // mmap.PAGESIZE))()
            pages = ctypes.c_void_p(address), ctypes.c_size_t(num_bytes)
            assert ctypes.CDLL(None).mincore(*pages, there) == 0
            found.extend(there)

    pinning = Looking()
    pinning.may_pin.release(100)
    memory = made_ready(PinnedMemory(20, mmap.PAGESIZE, pinning))
    assert [one & 1 for one in found] == [1] * 20
    memory.close()


@pytest.mark.parametrize(("touched_s", "flag"), [(0.9, "hg"), (1.1, "nh")])
def test_huge_pages_are_given_up_where_they_are_hard_to_come_by(
    touched_s: float, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may look for each of them for long."""
    now_s = iter(touched_s * n for n in range(1000))
    clock = SimpleNamespace(monotonic=lambda: next(now_s), sleep=lambda _: None)
    monkeypatch.setattr(pinned, "time", clock)
    pinning = PretendPinning()
    pinning.may_pin.release(100)
    memory = made_ready(PinnedMemory(6, mmap.PAGESIZE, pinning))
    if "hg" in Path("/proc/self/smaps").read_text():  # a kernel with huge pages
        assert flag in flags_of(memory.memory.data_ptr())
    assert len(memory.memory) == 6 * mmap.PAGESIZE
    memory.close()


def test_others_have_their_turn_between_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as pinning one took."""
    now_s, rests = [0.0], list[float]()

    class Slow(PretendPinning):
        def pin(self, address: int, num_bytes: int) -> None:
            super().pin(address, num_bytes)
            now_s[0] += 0.25

    clock = SimpleNamespace(monotonic=lambda: now_s[0], sleep=rests.append)
    monkeypatch.setattr(pinned, "time", clock)
    pinning = Slow()
    pinning.may_pin.release(100)
    memory = made_ready(PinnedMemory(6, mmap.PAGESIZE, pinning))
    assert rests == [0.25] * 3
    memory.close()


class NotedCondition(threading.Condition):
    """Says when somebody looks whether to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_at = threading.Semaphore(0)

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        self.looked_at.release()
        return super().wait_for(predicate, timeout)


def test_nothing_is_pinned_while_it_holds_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has it hold still goes on once what has begun is over."""
    changed = NotedCondition()
    pinning = PretendPinning()
    with monkeypatch.context() as patch:
        patch.setattr(pinned, "Condition", lambda: changed)
        memory = PinnedMemory(8, mmap.PAGESIZE, pinning)
    assert pinning.asked.acquire(timeout=LONG_S)
    for _ in range(2):
        assert changed.looked_at.acquire(timeout=LONG_S)
    holding = threading.Thread(target=memory.hold, kwargs={"still": True}, daemon=True)
    holding.start()
    assert changed.looked_at.acquire(timeout=LONG_S)
    assert holding.is_alive(), "a section is being pinned"
    pinning.may_pin.release(100)
    holding.join(LONG_S)
    assert not holding.is_alive()
    assert changed.looked_at.acquire(timeout=LONG_S)
    assert len(pinning.pinned) == 1, "another section was begun"
    assert not memory.is_ready
    memory.hold(still=False)
    assert len(made_ready(memory).memory) == 8 * mmap.PAGESIZE
    memory.close()


def test_a_gpus_worker_pins_nothing_while_graphs_are_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor where vLLM's capturing fails does it stay so."""
    from conserve.engine import connector
    from conserve.engine.door import GPUWorker
    from conserve.engine.gpu_worker import ConserveGPUWorker

    said: list[object] = []
    copies = SimpleNamespace(hold=lambda still: said.append(still))
    ours = SimpleNamespace(worker_side=SimpleNamespace(copies=copies))

    def capture(self: Any) -> str:
        said.append("captured")
        if said.count("captured") == 2:
            raise RuntimeError("out of memory")
        return "seconds"

    monkeypatch.setattr(connector, "_ours_here", lambda: ours)
    monkeypatch.setattr(GPUWorker, "compile_or_warm_up_model", capture)
    worker = ConserveGPUWorker.__new__(ConserveGPUWorker)
    assert worker.compile_or_warm_up_model() == "seconds"
    with pytest.raises(RuntimeError, match="out of memory"):
        worker.compile_or_warm_up_model()
    assert said == [True, "captured", False] * 2
    monkeypatch.setattr(connector, "_ours_here", lambda: None)
    assert worker.compile_or_warm_up_model() == "seconds"


def test_a_pool_on_its_way_holds_still_when_told() -> None:
    device = PinningDevice()
    copies = on_streams(device, caches())
    copies.hold(still=False)
    device.may_pin.release(100)
    memory = made_ready(copies._making._pinned)  # type: ignore[union-attr]
    copies.hold(still=True)
    assert memory._is_still
    copies.begin_step(Orders())
    copies.hold(still=True)  # it is there: nothing goes on that could be held
    assert not memory._is_still
    copies.close()


def test_what_could_be_pinned_before_a_failure_is_the_pool() -> None:
    pinning = PretendPinning(fails_at=3)
    pinning.may_pin.release(100)
    memory = made_ready(PinnedMemory(20, mmap.PAGESIZE, pinning))
    assert memory.why_not == "the driver has had enough"
    assert len(memory.memory) == 3 * 2 * mmap.PAGESIZE
    memory.close()
    assert not pinning.pinned


def test_an_engine_that_ends_meanwhile_gives_back_what_it_has() -> None:
    pinning = PretendPinning()
    memory = PinnedMemory(20, mmap.PAGESIZE, pinning)
    assert pinning.asked.acquire(timeout=LONG_S)
    pinning.may_pin.release()
    closing = threading.Thread(target=memory.close)
    closing.start()
    pinning.may_pin.release(100)
    closing.join(LONG_S)
    assert not closing.is_alive()
    assert not pinning.pinned


def test_an_address_space_that_is_too_small_names_the_flag() -> None:
    with pytest.raises(MemoryError, match="--checkpoint-bytes"):
        PinnedMemory(1 << 60, 4096, PretendPinning())


def on_streams(
    device: PinningDevice, kv: dict[str, torch.Tensor], folder: Path | None = None
) -> CheckpointWorker:
    """With a tier on disk where there is a folder for it."""
    settings, size = EngineSettings(), SIZE
    if folder is not None:
        settings = EngineSettings(checkpoint_dir=str(folder), checkpoint_dir_bytes=1 << 20)
        size = PoolSize(NUM_SLOTS, 2, SIZE.slot_bytes)
    copies = CheckpointWorker(settings, size, num_blocks=6)
    copies._making = StreamMaking(list(kv.values()), size, settings, device)
    return copies


def test_a_devices_pool_is_reported_when_it_is_pinned_and_not_while_steps_are_timed() -> None:
    device, kv = PinningDevice(), caches()
    copies = on_streams(device, kv)
    copies.begin_step(Orders())
    assert copies.report() is None, "it is on its way"
    device.may_pin.release(100)
    made_ready(copies._making._pinned)  # type: ignore[union-attr]
    copies.begin_step(Orders(hold_still=True))
    assert copies.report() is None, "the link is not measured meanwhile"
    copies.begin_step(Orders())
    report = copies.report()
    assert report is not None
    assert report.pools == [NUM_SLOTS]
    copies.begin_step(Orders(num_slots=4, jobs=[store(1, 2, 3)], wait=[1]))
    copies.begin_step(Orders(num_slots=4, jobs=[Job(2, False, [5], [3])], wait=[2]))
    device.finish()
    assert all(torch.equal(cache[5], cache[2]) for cache in kv.values())
    copies.close()
    assert not device.pinned


def test_what_is_on_disk_is_read_into_memory_that_the_device_copies_from(tmp_path: Path) -> None:
    device = PinningDevice()
    copies = on_streams(device, caches(), tmp_path)
    device.may_pin.release(100)
    made_ready(copies._making._pinned)  # type: ignore[union-attr]
    copies.begin_step(Orders())
    assert copies._pool is not None
    slots = copies._pool.slots
    assert not slots.move([(0, NUM_SLOTS)])
    (found,) = stretches_of(slots, [NUM_SLOTS], outward=False)
    assert [found.kept.data_ptr()] == [made.data_ptr() for made in device.host_made]
    copies.close()


def test_a_device_with_nothing_pinned_keeps_nothing() -> None:
    device = PinningDevice(fails_at=0)
    copies = on_streams(device, caches())
    device.may_pin.release(100)
    made_ready(copies._making._pinned)  # type: ignore[union-attr]
    copies.begin_step(Orders())
    report = copies.report()
    assert report is not None
    assert report.unusable == "the driver has had enough"
    copies.close()


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[mmap.mmap]]:
    """Whatever is mapped: the pool's memory."""
    made: list[weakref.ref[mmap.mmap]] = []

    class Noted(mmap.mmap):
        def __new__(cls, *args: Any, **kwargs: Any) -> Noted:
            new = super().__new__(cls, *args, **kwargs)
            made.append(weakref.ref(new))
            return new

    monkeypatch.setattr(mmap, "mmap", Noted)
    return made


class Held:
    """What a pool on its way has taken."""

    def __init__(self, making: Any, maps: list[weakref.ref[mmap.mmap]]) -> None:
        self._making, self._maps = making, maps
        self._staging = [weakref.ref(one) for one in making._staging]
        self._descriptor = making._file.descriptor

    def assert_given_back(self) -> None:
        """At once, whoever still refers to whom."""
        assert len(self._maps) == 1
        assert not any(one() is not None for one in (*self._maps, *self._staging))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(self._descriptor)


@pytest.mark.parametrize("how", ["close", "give back"])
def test_all_of_a_devices_pool_is_given_back(
    tmp_path: Path, maps: list[weakref.ref[mmap.mmap]], how: str
) -> None:
    """At the end, or when another rank can keep none: pinned and mapped memory, the device's."""
    device = PinningDevice()
    copies = on_streams(device, caches(), tmp_path)
    held = Held(copies._making, maps)
    device.may_pin.release(100)
    made_ready(copies._making._pinned)  # type: ignore[union-attr]
    copies.begin_step(Orders())
    copies.begin_step(Orders(num_slots=4, jobs=[store(1, 2, 3)], wait=[1]))
    if how == "close":
        copies.close()
    else:
        copies.begin_step(Orders(num_slots=4, jobs=[store(2, 3, 2)], give_back=True))
        assert copies.copier is None
        copies.begin_step(Orders(give_back=True))
        copies.close()
    assert not device.pinned
    held.assert_given_back()


def test_so_is_one_that_is_still_on_its_way(
    tmp_path: Path, maps: list[weakref.ref[mmap.mmap]]
) -> None:
    device = PinningDevice()
    copies = on_streams(device, caches(), tmp_path)
    held = Held(copies._making, maps)
    device.may_pin.release(100)
    copies.begin_step(Orders(give_back=True))
    assert not device.pinned
    held.assert_given_back()


def test_a_link_that_cannot_be_measured_leaves_nothing_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copies that were to be timed are over before their memory goes."""
    device = PinningDevice()
    copies = on_streams(device, caches())
    device.may_pin.release(100)
    made_ready(copies._making._pinned)  # type: ignore[union-attr]

    def gone(begun: object, done: object) -> float:
        device.streams[1].submit(lambda: None)
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(device, "seconds", gone)
    copies.begin_step(Orders())
    report = copies.report()
    assert report is not None
    assert report.unusable == "the device is gone"
    assert not device.pinned
    copies.close()


# The scheduler


def checkpointer(num_ranks: int) -> Checkpointer:
    return Checkpointer(HostPool(0, 4, 7), Bandwidth(16.0, 1e6), num_ranks=num_ranks)


def test_nothing_is_copied_before_every_rank_has_its_pool() -> None:
    keeper = checkpointer(num_ranks=2)
    view = HostView(keeper)
    view.copy_tokens(1.0)
    assert view.copy_tokens(1.1) == 0
    assert view.restore_tokens_per_s == 0.0
    assert keeper.take_orders().num_slots == 0
    keeper.take(Report(pools=[10], bytes_per_s=2e6))
    assert view.copy_tokens(1.2) == 0
    keeper.take(Report(pools=[10], bytes_per_s=3e6))
    assert view.copy_tokens(1.3) > 0
    assert view.restore_tokens_per_s == 2e6 / 16, "the slowest rank's"
    assert keeper.take_orders().num_slots == 10


def test_the_pool_is_as_large_as_the_smallest_of_the_ranks() -> None:
    keeper = checkpointer(num_ranks=2)
    keeper.take(Report(pools=[10]).aggregate(Report(pools=[6])))
    assert keeper.take_orders().num_slots == keeper.pool.num_slots == 6
    assert keeper.pool.num_disk_slots == 7


def test_a_rank_that_can_keep_nothing_has_all_of_them_give_back() -> None:
    keeper = checkpointer(num_ranks=2)
    keeper.take(Report(pools=[10]).aggregate(Report(unusable="no memory")))
    orders = keeper.take_orders()
    assert orders.give_back
    assert orders.num_slots == 0
    assert keeper.unusable == "no memory"
    assert not checkpointer(num_ranks=2).take_orders().give_back


# What is looked at of vLLM's KV


def test_layers_that_share_memory_are_one_plane() -> None:
    kv = caches()
    kv["again"] = kv["layers.0"]
    split = {"one": torch.zeros((12, 2, 2, 8))}
    assert len(planes_of(kv, 6)) == 3
    assert planes_of(split, 6)[0].shape == (6, 2, 2, 2, 8)


def test_layers_that_pack_tokens_differently_are_copied_by_whole_blocks() -> None:
    current_platform.import_kernels()
    kv = {"a": torch.zeros(4, 2, 32, 64), "b": torch.zeros(4, 2, 32, 64)}
    woven, other = attention_layer(CPU, "vec"), attention_layer("somebody.Elses")
    assert packing_of_all(kv, {"a": woven, "b": woven, "c": object()}) is packing.cpu
    assert packing_of_all(kv, {"a": woven, "b": other}) is packing.whole
    assert packing_of_all(kv, {}) is packing.whole
