"""Models that write by block diffusion: vLLM has a scheduler of its own for their canvases."""

from __future__ import annotations

from functools import cache
from typing import Any

from conserve.engine import door


def fitting(kind: type, vllm_config: Any) -> type:
    """`kind` of our scheduler over the one of vLLM's that fits the model: where it has a canvas,
    that which lets requests have narrower ones than it."""
    return kind if vllm_config.diffusion_config is None else _over_canvases(kind)


@cache
def _over_canvases(kind: type) -> type:
    return type(
        kind.__name__, (kind, door.DiffusionAsyncScheduler), {"__module__": kind.__module__}
    )
