"""What is asked of `torch.cuda`: in one module, by names that torch has, in the order it needs."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import conserve
from conserve.engine import cuda

pytestmark = pytest.mark.engine

DEVICE = torch.device("cpu")
"""Stands for any: what is asked of it is only noted."""


def test_one_module_names_torch_cuda() -> None:
    root = Path(conserve.__file__).parent
    found = [path for path in root.rglob("*.py") if re.search(r"torch\.cuda\b", path.read_text())]
    assert {str(path.relative_to(root)) for path in found} == {
        "engine/cuda.py",
        "engine/safepoints.py",  # in a docstring
    }


class Asked(list[tuple[Any, ...]]):
    """Stands in for torch.cuda's streams and events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int = 0) -> None:
        note = self.append

        class Event:
            def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
                assert enable_timing, "its time is asked for"
                assert blocking, "a thread that spins holds the interpreter"

            def record(self, stream: Any) -> None:
                note(("record", stream))

            def elapsed_time(self, other: Any) -> float:
                return 250.0

        class Stream:
            def __init__(self, device: Any, priority: int) -> None:
                note(("stream", device, priority))

            @staticmethod
            def priority_range() -> tuple[int, int]:
                return (0, -5)

            def wait_event(self, event: Any) -> None:
                note(("wait", event))

        class Entered:
            def __init__(self, stream: Any) -> None:
                self.stream = stream

            def __enter__(self) -> None:
                note(("enter", self.stream))

            def __exit__(self, *_: object) -> None:
                note(("leave", self.stream))

        def register(address: int, num_bytes: int, flags: int) -> SimpleNamespace:
            note(("register", address, num_bytes, flags))
            return SimpleNamespace(value=error)

        runtime = SimpleNamespace(
            cudaHostRegister=register, cudaHostUnregister=lambda at: note(("unregister", at))
        )
        for name, value in (("Event", Event), ("Stream", Stream), ("stream", Entered)):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)


def test_work_is_queued_on_its_stream_where_kv_may_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Asked(monkeypatch)
    stream = cuda.CudaDevice(DEVICE).side_stream()
    modes: list[bool] = []
    stream.submit(lambda: modes.append(torch.is_inference_mode_enabled()))
    event = stream.record()
    stream.wait(event)
    inner = stream._stream
    assert modes == [True]
    assert asked == [
        ("stream", DEVICE, 0), ("enter", inner), ("leave", inner), ("record", inner),
        ("wait", event),
    ]  # fmt: skip
    assert cuda.CudaDevice(DEVICE).seconds(event, event) == 0.25


def test_memory_that_cannot_be_pinned_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, error=2)
    with pytest.raises(MemoryError, match="cudaHostRegister of 8192 bytes"):
        cuda.CudaDevice(DEVICE).pin(4096, 8192)
    assert asked == [("register", 4096, 8192, 0)]


def test_a_thread_says_which_device_it_works_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on where the driver's library is not to be had."""
    devices: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    cuda.CudaDevice(DEVICE).prepare_thread()
    assert devices == [DEVICE]


def test_a_copy_from_the_host_is_of_pinned_memory_where_it_can_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a CUDA device it cannot."""
    assert len(cuda.CudaDevice(DEVICE).host_empty(4096)) == 4096
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "empty", lambda *_, **words: asked.append(words))
    cuda.CudaDevice(DEVICE).host_empty(4096)
    assert asked == [{"dtype": torch.int8, "pin_memory": True}]


class Timeline:
    """Two streams' events on the device's clock, in ms; the host's clock beside it, in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms, self.waited_for = 0.0, list[Any]()
        """`now_ms`: how far the device is. What is queued on the current stream ends at 40 ms."""
        timeline = self

        class Event:
            def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
                assert enable_timing, "its time is asked for"
                self.at_ms = 0.0

            def record(self, stream: Any = None) -> None:
                self.at_ms = 40.0 if stream is None else timeline.now_ms

            def query(self) -> bool:
                return timeline.now_ms >= self.at_ms

            def synchronize(self) -> None:
                timeline.waited_for.append(self)
                timeline.now_ms = max(timeline.now_ms, self.at_ms)

            def elapsed_time(self, other: Any) -> float:
                assert self.query(), "asked for before it was passed"
                assert other.query(), "asked for before it was passed"
                return float(other.at_ms - self.at_ms)

        class Stream:
            def __init__(self, priority: int) -> None:
                assert priority < 0, "one of the forwards' priority may share their queue"

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(
            cuda, "time", SimpleNamespace(monotonic=lambda: 100 + self.now_ms / 1e3)
        )


def test_a_mark_says_when_the_device_passed_it_however_late_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timeline = Timeline(monkeypatch)
    mark = cuda.CudaMarks()()
    assert mark.passed_s() == 100.0, "not yet: the present"
    assert not timeline.waited_for
    for now_ms in (40.0, 55.0, 400.0):
        timeline.now_ms = now_ms
        assert mark.passed_s() == pytest.approx(100.040)


def test_a_mark_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline(monkeypatch)
    mark = cuda.CudaMarks()()
    mark.wait()
    assert timeline.now_ms == 40.0
    assert mark.passed_s() == pytest.approx(100.040)
