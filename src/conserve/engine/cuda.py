"""Everything that we ask of `torch.cuda`: no other module of ours names it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress

import torch

from conserve.engine.safepoints import DeviceEvent


def make_event() -> DeviceEvent:
    """One that bounds the host's run-ahead; waiting for it costs the least latency."""
    return torch.cuda.Event()  # type: ignore[no-any-return]


def device_name() -> str:
    """What is measured here; empty without a CUDA device."""
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else ""


RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED."""


class CudaStream:
    """`checkpoint.device.Stream`."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def submit(self, work: Callable[[], None]) -> None:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            work()

    def record(self) -> torch.cuda.Event:
        # Whoever waits for it sleeps: a spinning thread would take the interpreter from the
        # one that queues the forward.
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        self._stream.wait_event(event)

    def synchronize(self) -> None:
        self._stream.synchronize()


class CudaDevice:
    """`checkpoint.device.Device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def prepare_thread(self) -> None:
        torch.cuda.set_device(self._device)
        # Somebody may capture CUDA graphs meanwhile, in the mode that forbids all other threads
        # what may have to wait for the device, unless a thread says that it knows.
        with suppress(OSError, AttributeError):
            mode = ctypes.c_int(RELAXED)
            ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def compute_stream(self) -> CudaStream:
        return CudaStream(torch.cuda.current_stream(self._device))

    def side_stream(self) -> CudaStream:
        # No priority is below the one that vLLM's own stream has; what is queued on this one is
        # short on the multiprocessors, and long only on the copy engines.
        lowest, _ = torch.cuda.Stream.priority_range()
        return CudaStream(torch.cuda.Stream(self._device, priority=lowest))

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.int8, device=self._device)

    def host_empty(self, num_bytes: int) -> torch.Tensor:
        # A copy from memory that is not pinned may have the host wait for all that is queued before
        # it. Pinned memory of torch's own is not handed out again before its copies are over.
        try:
            return torch.empty(num_bytes, dtype=torch.int8, pin_memory=True)
        except RuntimeError:  # no more can be pinned
            return torch.empty(num_bytes, dtype=torch.int8)

    def seconds(self, begun: torch.cuda.Event, done: torch.cuda.Event) -> float:
        return float(begun.elapsed_time(done)) / 1e3

    # Pinned memory, `checkpoint.pinned.Pinning`

    def pin(self, address: int, num_bytes: int) -> None:
        error = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
        if error.value:
            raise MemoryError(f"cudaHostRegister of {num_bytes} bytes: {error}")

    def unpin(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)


class CudaMarks:
    """Makes `step_times.Mark`s in the queue of the current stream, vLLM's for forwards."""

    def __init__(self) -> None:
        self._idle: torch.cuda.Stream | None = None

    def __call__(self) -> CudaMark:
        if self._idle is None:
            # Of another priority: streams of one may share a queue, and wait for each other there.
            self._idle = torch.cuda.Stream(priority=-1)
        return CudaMark(self._idle)


class CudaMark:
    """CUDA tells how far apart two events are, and no event's time of day: one that is passed at
    once, on a stream with nothing queued, shows how long ago this one was."""

    def __init__(self, idle: torch.cuda.Stream) -> None:
        self._idle = idle
        # Whoever waits for it sleeps, and does not hold up the thread that queues forwards.
        self._event = torch.cuda.Event(enable_timing=True, blocking=True)
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def passed_s(self) -> float:
        if not self._event.query():
            return time.monotonic()
        now = torch.cuda.Event(enable_timing=True)
        now.record(self._idle)
        now.synchronize()
        return time.monotonic() - float(self._event.elapsed_time(now)) / 1e3
