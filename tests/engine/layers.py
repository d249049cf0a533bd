"""Attention layers as vLLM registers them, with what our copies look at and no kernel."""

from __future__ import annotations

from types import SimpleNamespace

from conserve.engine.checkpoint.packing import BACKENDS

FLASH = f"{BACKENDS}.flash_attn.FlashAttentionBackend"
TRITON = f"{BACKENDS}.triton_attn.TritonAttentionBackend"
CPU = f"{BACKENDS}.cpu_attn.CPUAttentionBackend"


def attention_layer(
    backend: str, isa: str = "", kv_cache_dtype: str = "auto", called: str = ""
) -> SimpleNamespace:
    """backend: the class's full name. called: what its `get_name` says."""
    module, _, name = backend.rpartition(".")
    kind = type(name, (), {"get_name": staticmethod(lambda: called), "__module__": module})
    return SimpleNamespace(attn_backend=kind, isa=isa, kv_cache_dtype=kv_cache_dtype)
