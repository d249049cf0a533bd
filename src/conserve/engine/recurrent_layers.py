"""Safepoints of recurrent layers: vLLM calls KV connectors before layers of attention alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

KERNELS = {
    "MambaMixer": ("forward_impl",),
    "MambaMixer2": ("conv_ssm_forward",),
    "ShortConv": ("forward_cuda", "forward_native"),
    "QwenGatedDeltaNetAttention": ("_forward_core", "_forward_core_fused_norm_packed"),
    "OlmoHybridGatedDeltaNetAttention": ("_full_forward",),
    "LinearAttention": ("_forward",),
}
"""Class of layer -> what its custom op calls, in Python also where the rest is compiled. A layer of
another class has no safepoint of its own; the next one with attention does."""


def watch(layers: Iterable[Any], at_layer: Callable[[], None]) -> None:
    """Have these layers call `at_layer` before they touch their state."""
    for layer in layers:
        for name in _kernels(layer):
            setattr(layer, name, _behind(at_layer, getattr(layer, name)))


def _kernels(layer: Any) -> tuple[str, ...]:
    found = (KERNELS[one.__name__] for one in type(layer).__mro__ if one.__name__ in KERNELS)
    return next(found, ())


def _behind(at_layer: Callable[[], None], kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        at_layer()
        return kernel(*args, **kwargs)

    return run
