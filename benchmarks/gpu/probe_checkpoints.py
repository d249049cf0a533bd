"""The product's own copies between an engine's KV and pinned memory: how fast, how long the host
is busy with them, how long a forward waits, what a restore takes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from probe import Probe

from conserve.engine.checkpoint.copier import StreamCopier
from conserve.engine.checkpoint.copy_queue import CopyQueue
from conserve.engine.checkpoint.making import planes_of
from conserve.engine.checkpoint.orders import Ended, Job, Orders
from conserve.engine.checkpoint.pinned import PinnedMemory
from conserve.engine.checkpoint.rows import BlockRows
from conserve.engine.checkpoint.slots import HostSlots
from conserve.engine.checkpoint.staging import staging_buffers
from conserve.engine.checkpoint.streams import StreamCopies

POOL_BYTES = 2 << 30
NUM_REPEATS = 5
LONG_S = 60.0
"""A copy that takes longer is a failure."""
POLL_S = 1e-4
"""Between looks at a copy: whoever looks without a pause takes the interpreter, and the copier's
lock, from those who are timed."""


class Link:
    """A pool beside an engine that has none, and the copies between the two. It writes to blocks
    of the engine's KV: nobody may be using them."""

    def __init__(self, probe: Probe) -> None:
        config = probe.scheduler.vllm_config
        layers = config.compilation_config.static_forward_context
        kv = {name: layer.kv_cache for name, layer in layers.items() if hasattr(layer, "kv_cache")}
        num_blocks = config.cache_config.num_gpu_blocks
        self.rows = BlockRows(planes_of(kv, num_blocks))
        self.num_slots = max(1, min(POOL_BYTES // self.rows.slot_bytes, num_blocks // 2))
        device = _device(self.rows.device)
        started_s = time.perf_counter()
        self._pinned = PinnedMemory(self.num_slots, self.rows.slot_bytes, device)
        _until(lambda: self._pinned.is_ready)
        self.pinning_s = time.perf_counter() - started_s
        slots = HostSlots(
            self._pinned.memory,
            self.rows.slot_bytes,
            slots_per_section=self._pinned.slots_per_section,
        )
        staging = staging_buffers(device, self.rows.slot_bytes)
        queue = CopyQueue(self.rows.slot_bytes)
        copies = StreamCopies(queue, self.rows, slots, device, staging)
        self.measured_bytes_per_s = copies.measure()
        self._copier = StreamCopier(copies)
        self._numbers = count(1)

    def copy(self, job: Job, *, waits: bool = False) -> dict[str, float]:
        """One job alone, to its end. host_s: in the main thread, before the forward; seconds: until
        its end was seen; bytes_per_s: of the device's own time for it."""
        orders = Orders(jobs=[job], wait=[job.number] if waits else [])
        started_s = time.perf_counter()
        self._copier.begin_step(orders)
        host_s = time.perf_counter() - started_s
        ended, wait_s = self._finish(job.number, waits=waits)
        seconds = time.perf_counter() - started_s
        bytes_per_s = len(job.slots) * self.rows.slot_bytes / ended.seconds
        return {"host_s": host_s, "wait_s": wait_s, "seconds": seconds, "bytes_per_s": bytes_per_s}

    def _finish(self, number: int, *, waits: bool) -> tuple[Ended, float]:
        """How it ended, and how long the forward was held up."""
        ended, wait_s, deadline_s = None, 0.0, time.perf_counter() + LONG_S
        while ended is None or (waits and not wait_s):
            time.sleep(POLL_S)
            report = self._copier.report()
            if report is not None:
                ended = report.ended.get(number, ended)
                wait_s += report.wait_s
            if time.perf_counter() > deadline_s:
                raise TimeoutError(f"copy {number} is not over")
        if ended.failed_slots:
            raise RuntimeError(f"copy {number} failed in {len(ended.failed_slots)} slots")
        return ended, wait_s

    def job(self, num_blocks: int, *, store: bool, scattered: bool) -> Job:
        chance = random.Random(num_blocks)
        blocks = chance.sample(range(self.rows.num_blocks), num_blocks)
        slots = list(range(self.num_slots))
        slots = chance.sample(slots, num_blocks) if scattered else slots[:num_blocks]
        return Job(next(self._numbers), store, blocks, slots)

    @contextmanager
    def busy(self, *, store: bool) -> Iterator[None]:
        """Copies 64 MiB after another until left."""
        num_blocks = max(1, min(self.num_slots, (64 << 20) // self.rows.slot_bytes))
        over = threading.Event()

        def run() -> None:
            # On the stream of the forwards each copy would wait for what is queued there.
            with own_stream():
                while not over.is_set():
                    self.copy(self.job(num_blocks, store=store, scattered=True))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def close(self) -> None:
        self._copier.close()
        self._pinned.close()


def measure(link: Link) -> dict[str, Any]:
    sizes = sorted({min(n, link.num_slots) for n in (1, 16, 128, 1024)})
    return {
        "slot_bytes": link.rows.slot_bytes,
        "pool_bytes": link.num_slots * link.rows.slot_bytes,
        "pinning_s": link.pinning_s,
        "measured_bytes_per_s": link.measured_bytes_per_s,
        "copies": [
            {"num_blocks": size, "store": store, "scattered": scattered, "waited_for": waits}
            | {"runs": [_once(link, size, store, scattered, waits) for _ in range(NUM_REPEATS)]}
            for size in sizes
            for store, waits in ((True, False), (True, True), (False, False))
            for scattered in (False, True)
        ],
    }


def _once(
    link: Link, num_blocks: int, store: bool, scattered: bool, waits: bool
) -> dict[str, float]:
    return link.copy(link.job(num_blocks, store=store, scattered=scattered), waits=waits)


def own_stream() -> Any:
    """What this thread queues meanwhile waits for nothing that others queue."""
    return torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else nullcontext()


def _until(holds: Callable[[], bool]) -> None:
    deadline_s = time.perf_counter() + LONG_S
    while not holds():
        if time.perf_counter() > deadline_s:
            raise TimeoutError("memory is not pinned")
        time.sleep(0.001)


def _device(device: torch.device) -> Any:
    if device.type == "cuda":
        from conserve.engine.cuda import CudaDevice

        return CudaDevice(device)
    return _AtOnce()


class _AtOnce:
    """For `--tiny`: a device whose streams are done with everything as soon as it is queued."""

    def prepare_thread(self) -> None: ...
    def pin(self, address: int, num_bytes: int) -> None: ...
    def unpin(self, address: int) -> None: ...

    def compute_stream(self) -> _AtOnce:
        return self

    side_stream = compute_stream

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.int8)

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def record(self) -> _Passed:
        return _Passed()

    def wait(self, event: _Passed) -> None: ...
    def synchronize(self) -> None: ...

    def seconds(self, begun: _Passed, done: _Passed) -> float:
        return max(done.at_s - begun.at_s, 1e-9)


class _Passed:
    def __init__(self) -> None:
        self.at_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...
