"""The host link: how fast, plainly and by the product's own copies; what those do to a step."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Any

import probe_checkpoints
import torch
from probe import Probe
from probe_checkpoints import Link, own_stream

ON_CUDA = torch.cuda.is_available()
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
    del device, host
    link = Link(probe)
    found = {"rates": rates, "checkpoints": probe_checkpoints.measure(link)}
    probe.keep("copies", found)
    effect = [_effect(probe, link, direction) for direction in DIRECTIONS]
    link.close()
    return {**found, "effect": effect}


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
    with own_stream():
        for _ in range(5):
            _settle()
            started = time.perf_counter()
            _copy(device, host, direction, piece)
            _settle()
            times.append(time.perf_counter() - started)
    return len(device) / statistics.median(times)


def _effect(probe: Probe, link: Link, direction: str) -> dict[str, Any]:
    """The same prefill and decode steps with and without copies going on all the while."""
    size = min(2048, probe.most_tokens, probe.longest)
    residents = [probe.prefill(min(128, probe.most_tokens)) for _ in range(8)]
    times: dict[str, list[float]] = {}
    for pair in range(NUM_PAIRS + 1):
        for busy in (False, True) if pair % 2 else (True, False):
            with link.busy(store=direction == "to_host") if busy else nullcontext():
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
