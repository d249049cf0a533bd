"""The host link: pinned copies on a side stream, how fast, and what they do to a step."""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import nullcontext
from typing import Any

import torch
from probe import Probe

ON_CUDA = torch.cuda.is_available()
BLOCK_TOKENS = 16
NUM_PAIRS = 20
DIRECTIONS = ("to_host", "to_device")


def measure(probe: Probe) -> dict[str, Any]:
    num_bytes = 1 << (29 if ON_CUDA else 22)
    device = torch.empty(num_bytes, dtype=torch.uint8, device="cuda" if ON_CUDA else "cpu")
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=ON_CUDA)
    rates = [
        {
            "direction": direction,
            "piece_bytes": piece,
            "bytes_per_s": _rate(device, host, direction, piece),
        }
        for direction in DIRECTIONS
        for piece in (1 << 15, 1 << 18, 1 << 21, num_bytes)
    ]
    gathered = _gathered(device, host) if ON_CUDA else None
    effect = [_effect(probe, device, host, direction) for direction in DIRECTIONS]
    return {"rates": rates, "gathered_to_host": gathered, "effect": effect}


def _stream() -> Any:
    return torch.cuda.stream(torch.cuda.Stream()) if ON_CUDA else nullcontext()


def _settle() -> None:
    if ON_CUDA:
        torch.cuda.current_stream().synchronize()


def _copy(device: torch.Tensor, host: torch.Tensor, direction: str, piece: int) -> None:
    to, source = (host, device) if direction == "to_host" else (device, host)
    for start in range(0, len(device), piece):
        to[start : start + piece].copy_(source[start : start + piece], non_blocking=True)


def _rate(device: torch.Tensor, host: torch.Tensor, direction: str, piece: int) -> float:
    """Median over five copies of all bytes in pieces."""
    if len(device) // piece > 4096:
        device, host = device[: 4096 * piece], host[: 4096 * piece]
    times = []
    with _stream():
        for _ in range(5):
            _settle()
            started = time.perf_counter()
            _copy(device, host, direction, piece)
            _settle()
            times.append(time.perf_counter() - started)
    return len(device) / statistics.median(times)


def _gathered(device: torch.Tensor, host: torch.Tensor) -> dict[str, float]:
    """Scattered blocks of 32 KiB gathered on the device, then one bulk copy."""
    blocks = device.view(-1, 1 << 15)
    chosen = torch.randperm(len(blocks), device="cuda")[: len(blocks) // 4]
    out = torch.empty(len(chosen), 1 << 15, dtype=torch.uint8, device="cuda")
    target = host[: out.numel()].view_as(out)
    times = []
    with _stream():
        for _ in range(5):
            _settle()
            started = time.perf_counter()
            torch.index_select(blocks, 0, chosen, out=out)
            target.copy_(out, non_blocking=True)
            _settle()
            times.append(time.perf_counter() - started)
    return {"piece_bytes": 1 << 15, "bytes_per_s": out.numel() / statistics.median(times)}


def _effect(
    probe: Probe, device: torch.Tensor, host: torch.Tensor, direction: str
) -> dict[str, Any]:
    """The same prefill and decode steps with and without copies going on all the while."""
    size = min(2048, probe.most_tokens, probe.longest)
    residents = [probe.prefill(min(128, probe.most_tokens)) for _ in range(8)]
    times: dict[str, list[float]] = {}
    for pair in range(NUM_PAIRS + 1):
        for busy in (False, True) if pair % 2 else (True, False):
            with _copying(device, host, direction) if busy else nullcontext():
                name = probe.add(size)
                prefill_s = probe.step({name: size})[1]
                probe.drop([name])
                decode_s = probe.step(dict.fromkeys(residents, 1))[1]
            if pair:
                label = "busy" if busy else "quiet"
                times.setdefault(f"prefill_{label}_s", []).append(prefill_s)
                times.setdefault(f"decode_{label}_s", []).append(decode_s)
        if pair > 2 and probe.is_late:
            break
    probe.drop(residents)
    slower = {
        kind: statistics.median(times[f"{kind}_busy_s"])
        / statistics.median(times[f"{kind}_quiet_s"])
        - 1
        for kind in ("prefill", "decode")
    }
    return {"direction": direction, "num_tokens": size, **times, "slowdown": slower}


class _copying:  # noqa: N801 - used as a context
    """Copies 64 MiB after another on a stream of its own until left."""

    def __init__(self, device: torch.Tensor, host: torch.Tensor, direction: str) -> None:
        part = min(1 << 26, len(device))
        self._arguments = (device[:part], host[:part], direction, part)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with _stream():
            while not self._over.is_set():
                _copy(*self._arguments)
                _settle()
                time.sleep(0)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
