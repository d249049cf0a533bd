"""`benchmarks/gpu/probe_checkpoints.py` on a CPU: its figures mean nothing there, but it runs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
pytestmark = pytest.mark.engine


def engine_with(kv: torch.Tensor) -> Any:
    """As much of an engine as the probe looks at: layers that hold their KV, [blocks, ...]."""
    layers = {f"layer{i}": SimpleNamespace(kv_cache=layer) for i, layer in enumerate(kv)}
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers | {"norm": object()}),
        cache_config=SimpleNamespace(num_gpu_blocks=kv.shape[1]),
    )
    return SimpleNamespace(scheduler=SimpleNamespace(vllm_config=config))


def test_the_products_copies_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    probe = import_module("probe_checkpoints")
    monkeypatch.setattr(probe, "NUM_REPEATS", 1)
    link = probe.Link(engine_with(torch.rand(2, 40, 2, 16, 8)))
    found = probe.measure(link)
    for store in (True, False):
        with link.busy(store=store):
            pass
    link.close()
    assert found["slot_bytes"] == 2 * 2 * 16 * 8 * 4
    waits = [
        run["wait_s"] > 0 for one in found["copies"] if one["waited_for"] for run in one["runs"]
    ]
    assert waits
    assert all(waits)
    assert {one["store"] for one in found["copies"]} == {True, False}
