"""Models that write, with attention to all tokens in every layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.models.family import Family, texts
from tests.models.weights import save, sizes
from tests.stops.tiny_llama import make_model


def make_qwen3(folder: Path) -> Path:
    return save(Qwen3ForCausalLM(Qwen3Config(**sizes())), folder)


def make_qwen3_moe(folder: Path) -> Path:
    config = Qwen3MoeConfig(
        **sizes(), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    )
    return save(Qwen3MoeForCausalLM(config), folder)


def make_deepseek_v3(folder: Path) -> Path:
    about = {**sizes(), "num_key_value_heads": 4}
    del about["head_dim"]
    config = DeepseekV3Config(
        **about,
        q_lora_rank=64,
        kv_lora_rank=512,  # with the next, what MLA's kernels have
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=64,
        first_k_dense_replace=2,
    )
    config.topk_method = "noaux_tc"  # vLLM's word for the bias of experts
    return save(DeepseekV3ForCausalLM(config), folder)


LLAMA = Family("full attention", make_model, num_blocks=40)
FAMILIES = {
    "Llama": LLAMA,
    "Qwen3": replace(LLAMA, make=make_qwen3),
    "Qwen3-MoE": replace(LLAMA, layers="full attention; experts", make=make_qwen3_moe),
    # vLLM's CPU build answers otherwise where prompts of MLA share a step, with its own scheduler,
    # too: so there is one request at a time. It also cuts no prompt of such a model.
    "DeepSeek-V3": Family(
        "MLA; experts",
        make_deepseek_v3,
        num_blocks=80,
        cuts_prompts=False,
        options={"block_size": 16, "max_num_seqs": 1},
        ask=partial(texts, num_prompts=6),
    ),
    "Llama, KV in fp8": replace(
        LLAMA, layers="full attention, in fp8", options={"kv_cache_dtype": "fp8"}
    ),
}
