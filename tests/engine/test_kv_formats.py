"""Every form in which vLLM keeps KV, by vLLM's own lists, and what copies make of it: rows of
tokens, whole blocks, or nothing at all."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.cache import CacheDType
from vllm.utils.torch_utils import nvfp4_split_data_scale
from vllm.v1 import kv_cache_interface
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec, KVQuantMode

from conserve.engine.checkpoint.packing import (
    CPU_BACKEND,
    ROW_BACKENDS,
    ROW_MODES,
    is_right,
    packing_for,
    rows,
    whole,
)
from conserve.engine.checkpoint.sizes import why_no_checkpoints
from conserve.engine.settings import EngineSettings
from tests.engine.layers import FLASH, attention_layer

pytestmark = pytest.mark.engine

IN_ROWS = {
    "auto", "float16", "bfloat16",
    "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla",  # scales of a whole layer, or inside
    "int4_per_token_head", "int8_per_token_head", "fp8_per_token_head",  # scales in the row
}  # fmt: skip
IN_WHOLE_BLOCKS = {
    "nvfp4", "nvfp4_4over6",  # scales behind the data of a page
    "nvfp4_ds_mla", "ultraquant_4bit",
    "turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc",
}  # fmt: skip
"""Of a backend that keeps rows: how the data type changes that."""

COPIED = {"FullAttentionSpec", "MLAAttentionSpec"}
REFUSED = {
    "KVCacheSpec": "no format",
    "AttentionSpec": "no format",
    "ChunkedLocalAttentionSpec": "drops what left the chunk",
    "CircularBufferSpec": "a ring of raw keys",
    "CrossAttentionSpec": "of the encoder's tokens",
    "EncoderOnlyAttentionSpec": "none at all",
    "HiSparseHotSpec": "pages of its own",
    "HiSparseResidentSpec": "pages of its own",
    "HiddenStateCacheSpec": "hidden states, not KV",
    "MambaSpec": "recurrent state",
    "RSWASpec": "drops what lies between prompt and window",
    "SinkFullAttentionSpec": "blocks that all requests share",
    "SlidingWindowMLASpec": "drops what left the window",
    "SlidingWindowSpec": "drops what left the window",
    "UniformTypeKVCacheSpecs": "layers of several widths",
}


def test_every_data_type_of_a_cache_is_placed() -> None:
    assert set(get_args(CacheDType)) == IN_ROWS | IN_WHOLE_BLOCKS
    plane = torch.zeros(4, 2, 16, 64)
    for name in get_args(CacheDType):
        expected = rows if name in IN_ROWS else whole
        for backend in ROW_BACKENDS:
            found = packing_for(attention_layer(backend, kv_cache_dtype=name), plane)
            assert found is expected, (backend, name)


def test_every_way_to_quantise_is_placed() -> None:
    placed = {
        "NVFP4", "NVFP4_DS_MLA", "ULTRAQUANT_4BIT",
        "TURBOQUANT_K8V4", "TURBOQUANT_4BIT_NC", "TURBOQUANT_K3V4_NC", "TURBOQUANT_3BIT_NC",
    }  # fmt: skip
    assert {mode.name for mode in KVQuantMode} == placed | set(ROW_MODES)


def test_every_backend_that_is_not_known_goes_by_whole_blocks() -> None:
    """By its class, not by the name that it gives itself: AITER's page is shuffled and it calls
    itself FLASH_ATTN."""
    known = {*ROW_BACKENDS, CPU_BACKEND}
    paths = {str(one.value) for one in AttentionBackendEnum if one.value}
    assert known < paths, "one of ours is gone"
    plane = torch.zeros(4, 2, 16, 64)
    for path in paths - known:
        assert packing_for(attention_layer(path, called="FLASH_ATTN"), plane) is whole, path


def specs() -> dict[str, Any]:
    return {
        name: kind
        for name, kind in inspect.getmembers(kv_cache_interface, inspect.isclass)
        if issubclass(kind, KVCacheSpec)
    }


def reason(spec: Any) -> str:
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["one"])
    cache = SimpleNamespace(
        kv_cache_groups=[group], has_mamba_layers=False, needs_kv_cache_zeroing=False
    )
    plain = SimpleNamespace(
        is_encoder_decoder=False,
        runner_type="generate",
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
    )
    config = SimpleNamespace(model_config=plain, parallel_config=plain, num_speculative_tokens=0)
    return why_no_checkpoints(config, cache, EngineSettings())


def test_every_kind_of_cache_is_placed() -> None:
    found = specs()
    assert set(found) == COPIED | set(REFUSED)
    for name in REFUSED:
        spec = object.__new__(found[name])
        assert "without full attention" in reason(spec), name


def attention(name: str, **more: Any) -> Any:
    fields = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    return specs()[name](**fields, **more)


@pytest.mark.parametrize("name", sorted(COPIED))
def test_of_the_kinds_that_are_copied_those_that_keep_every_token(name: str) -> None:
    assert reason(attention(name)) == ""
    for other in ({"sliding_window": 64}, {"attention_chunk_size": 64}, {"tokens_per_state": 4}):
        assert "without full attention" in reason(attention(name, **other)), other


def write_nvfp4(block: torch.Tensor, token: int) -> None:
    """A token of one side where vLLM's own views place it: data, and scales."""
    for view in nvfp4_split_data_scale(block.unsqueeze(0)):
        view[0, :, token].view(torch.uint8).fill_(1)


def test_nvfp4_pages_are_no_rows() -> None:
    """A row of 64 + 8 bytes in the page's shape is not where a token's bytes lie."""
    shape = (2, 16, 72)
    assert not is_right(rows, shape, torch.uint8, write_nvfp4)
    assert is_right(whole, shape, torch.uint8, write_nvfp4)
    plane = torch.zeros(4, *shape, dtype=torch.uint8)
    flash = FLASH.replace("flash_attn.FlashAttention", "flashinfer.FlashInfer")
    assert packing_for(attention_layer(flash, kv_cache_dtype="nvfp4"), plane) is whole
