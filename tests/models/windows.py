"""Models with layers that attend to a window, alone or beside full ones."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
)

from tests.models.family import Family
from tests.models.weights import save, sizes

WINDOW = 80
"""Tokens: two blocks and a half."""


def make_mistral(folder: Path) -> Path:
    return save(MistralForCausalLM(MistralConfig(**sizes(), sliding_window=WINDOW)), folder)


def make_gemma3(folder: Path) -> Path:
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    config = Gemma3TextConfig(
        **sizes(len(kinds)), sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=32
    )
    return save(Gemma3ForCausalLM(config), folder, embedding_scale=0.05)


def make_gpt_oss(folder: Path) -> Path:
    kinds = ["sliding_attention", "full_attention"] * 4
    config = GptOssConfig(
        **sizes(len(kinds)),
        sliding_window=WINDOW,
        layer_types=kinds,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return save(GptOssForCausalLM(config), folder)


def make_llama4(folder: Path) -> Path:
    about = {**sizes(), "intermediate_size_mlp": 256}
    config = Llama4TextConfig(
        **about,
        attention_chunk_size=96,
        no_rope_layers=[1, 1, 1, 0] * 2,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        use_qk_norm=False,
    )
    return save(Llama4ForCausalLM(config), folder)


FAMILIES = {
    "Mistral with a window": Family("a window in every layer", make_mistral, num_blocks=22),
    "Gemma 3": Family(
        "five layers with a window to a full one",
        make_gemma3,
        num_groups=6,
        num_blocks=110,
        always=True,
    ),
    "GPT-OSS": Family(
        "every second layer with a window; sinks, experts",
        make_gpt_oss,
        num_groups=2,
        num_blocks=46,
    ),
    "Llama 4": Family(
        "three layers that attend to chunks to a full one; experts",
        make_llama4,
        num_groups=4,
        num_blocks=80,
    ),
}
