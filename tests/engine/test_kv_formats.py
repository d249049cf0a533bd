"""Every form in which vLLM keeps KV, by vLLM's own lists, and what copies make of it: whole
blocks, parts of them where a CPU kernel's layout is known, or nothing at all."""

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
    packing_for,
    whole,
)
from conserve.engine.checkpoint.rows import BlockRows
from conserve.engine.checkpoint.sizes import why_no_checkpoints
from conserve.engine.door import VLLM_VERSION
from conserve.engine.settings import EngineSettings
from conserve.engine.versions import release
from tests.engine.layers import attention_layer

pytestmark = pytest.mark.engine

DATA_TYPES = {
    "auto", "float16", "bfloat16",
    "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla",  # scales of a whole layer, or inside
    "int4_per_token_head", "int8_per_token_head", "fp8_per_token_head",  # scales beside a token
    "nvfp4", "nvfp4_4over6",  # scales behind the data of a page
    "nvfp4_ds_mla", "ultraquant_4bit",
    "turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc",
    "octave_k3v4", "octave_k3v3", "octave_k3v3_compact",  # keys and values of a token in one code
}  # fmt: skip
"""Of each, a block's page holds all that it takes to read its tokens again, but for what a layer
has once and for all."""
QUANT_MODES = {
    "NONE", "FP8_PER_TENSOR",
    "FP8_PER_TOKEN_HEAD", "INT8_PER_TOKEN_HEAD", "INT4_PER_TOKEN_HEAD",
    "NVFP4", "NVFP4_DS_MLA", "ULTRAQUANT_4BIT",
    "TURBOQUANT_K8V4", "TURBOQUANT_4BIT_NC", "TURBOQUANT_K3V4_NC", "TURBOQUANT_3BIT_NC",
    "OCTAVE_K3V4", "OCTAVE_K3V3", "OCTAVE_K3V3_COMPACT",
}  # fmt: skip
LATER = {"0.32": "octave"}
"""Release -> how the names begin of what came after it."""

COPIED = {
    "FullAttentionSpec": {},
    "MLAAttentionSpec": {},
    "SlidingWindowSpec": {"sliding_window": 64},
    "ChunkedLocalAttentionSpec": {"attention_chunk_size": 64},
}
REFUSED = {
    "KVCacheSpec": "no format",
    "AttentionSpec": "no format",
    "CircularBufferSpec": "a ring of raw keys",
    "CrossAttentionSpec": "of the encoder's tokens",
    "EncoderOnlyAttentionSpec": "none at all",
    "HiSparseHotSpec": "pages of its own",
    "HiSparseResidentSpec": "pages of its own",
    "HiddenStateCacheSpec": "hidden states, not KV",
    "RSWASpec": "drops what lies between prompt and window",
    "SinkFullAttentionSpec": "blocks that all requests share",
    "SlidingWindowMLASpec": "a window of compressed states",
    "UniformTypeKVCacheSpecs": "layers of several widths",
}


def test_every_data_type_of_a_cache_has_been_looked_at() -> None:
    assert set(get_args(CacheDType)) == known(DATA_TYPES)
    assert {mode.name for mode in KVQuantMode} == known(QUANT_MODES)


def known(names: set[str]) -> set[str]:
    """Those that the installed vLLM has, too."""
    later = LATER.get(release(VLLM_VERSION))
    return {name for name in names if later is None or not name.lower().startswith(later)}


def test_every_backend_but_that_of_cpus_goes_by_whole_blocks() -> None:
    """By its class, not by the name that it gives itself: AITER's page is shuffled and it calls
    itself FLASH_ATTN."""
    paths = {str(one.value) for one in AttentionBackendEnum if one.value}
    assert CPU_BACKEND in paths, "ours is gone"
    plane = torch.zeros(4, 2, 16, 64)
    for path in paths - {CPU_BACKEND}:
        assert packing_for(attention_layer(path, called="FLASH_ATTN"), plane) is whole, path


def specs() -> dict[str, Any]:
    return {
        name: kind
        for name, kind in inspect.getmembers(kv_cache_interface, inspect.isclass)
        if issubclass(kind, KVCacheSpec)
    }


def reason(spec: Any) -> str:
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["one"])
    cache = SimpleNamespace(kv_cache_groups=[group], needs_kv_cache_zeroing=False)
    plain = SimpleNamespace(
        is_encoder_decoder=False,
        runner_type="generate",
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
        worker_cls="auto",
    )
    config = SimpleNamespace(model_config=plain, parallel_config=plain, speculative_config=None)
    return why_no_checkpoints(config, cache, EngineSettings())


def test_every_kind_of_cache_is_placed() -> None:
    found = specs()
    assert set(found) == {*COPIED, *REFUSED, "MambaSpec"}
    assert reason(object.__new__(found["MambaSpec"])) == ""
    for name in REFUSED:
        spec = object.__new__(found[name])
        assert "another cache" in reason(spec), name


def attention(name: str, **more: Any) -> Any:
    fields = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    return specs()[name](**fields, **more)


@pytest.mark.parametrize("name", sorted(COPIED))
def test_of_the_kinds_that_are_copied_those_with_a_state_for_each_token(name: str) -> None:
    assert reason(attention(name, **COPIED[name])) == ""
    several = {**COPIED[name], "tokens_per_state": 4}
    assert "another cache" in reason(attention(name, **several))


def test_an_nvfp4_page_goes_with_its_scales() -> None:
    """Data and scales where vLLM's own views place them."""
    pages = torch.zeros(4, 2, 16, 72, dtype=torch.uint8)
    for value, view in enumerate(nvfp4_split_data_scale(pages)):
        view[1].view(torch.uint8).fill_(value + 1)
    copies = BlockRows([pages])
    staged = torch.zeros((1, copies.slot_bytes), dtype=torch.int8)
    copies.gather([1], staged)
    copies.scatter(staged, [3])
    for value, view in enumerate(nvfp4_split_data_scale(pages)):
        assert view[3].view(torch.uint8).eq(value + 1).all()
    assert not pages[[0, 2]].any()
