"""Recurrent layers look whether to stop before they touch their state."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from types import ModuleType

import pytest

pytest.importorskip("vllm")

from conserve.engine.recurrent_layers import KERNELS, watch
from conserve.engine.safepoints import StopStep

pytestmark = pytest.mark.engine

HOMES = {
    "MambaMixer": "mamba_mixer",
    "MambaMixer2": "mamba_mixer2",
    "ShortConv": "short_conv",
    "QwenGatedDeltaNetAttention": "gdn.qwen_gdn_linear_attn",
    "OlmoHybridGatedDeltaNetAttention": "gdn.olmo_gdn_linear_attn",
    "LinearAttention": "linear.minimax_linear_attn",
}
"""Where vLLM has the class, and what calls it."""


def module_of(name: str) -> ModuleType:
    return import_module(f"vllm.model_executor.layers.mamba.{HOMES[name]}")


@pytest.mark.parametrize("name", KERNELS)
def test_a_custom_op_of_vllm_calls_each_kernel(name: str) -> None:
    """Python runs there even where the rest of a model is compiled."""
    ops = [
        node
        for node in ast.parse(inspect.getsource(module_of(name))).body
        if isinstance(node, ast.FunctionDef) and "no_compile_layers" in ast.unparse(node)
    ]
    called = {
        node.func.attr
        for op in ops
        for node in ast.walk(op)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert set(KERNELS[name]) <= called


@pytest.mark.parametrize("name", KERNELS)
def test_the_class_has_its_kernels(name: str) -> None:
    base = "linear.base" if name == "LinearAttention" else HOMES[name]
    home = import_module(f"vllm.model_executor.layers.mamba.{base}")
    kinds = [getattr(home, name), *getattr(home, name).__subclasses__()]
    assert all(any(hasattr(kind, kernel) for kind in kinds) for kernel in KERNELS[name])


class MambaMixer2:
    """By the name of vLLM's."""

    def __init__(self) -> None:
        self.state = 0

    def conv_ssm_forward(self, more: int) -> int:
        self.state += more
        return self.state


class OwnMixer(MambaMixer2):
    """A model's own, of that kind."""


def test_a_watched_layer_stops_before_it_touches_its_state() -> None:
    looks = []

    def at_layer() -> None:
        looks.append(1)
        if len(looks) == 2:
            raise StopStep(1)

    layer, other = OwnMixer(), object()
    watch([layer, other], at_layer)
    assert layer.conv_ssm_forward(3) == 3
    with pytest.raises(StopStep):
        layer.conv_ssm_forward(more=4)
    assert layer.state == 3
