"""Models about as fast as the default one, with the layers of families that keep KV otherwise, for
`conserve bench run --model`:

    python benchmarks/model_shapes.py out/models
    conserve bench run scarce --model out/models/gemma3 --scale 1 \\
        --server-arg=--load-format=dummy --server-arg=--kv-cache-memory-bytes=125829120

A folder has a configuration and the default model's tokenizer; vLLM fills in random weights.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import Gemma3TextConfig, GptOssConfig, PretrainedConfig, Qwen3NextConfig

from conserve.server.start.default_model import default_model

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)
COMMON: dict[str, Any] = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "bfloat16",
}


def gemma3() -> PretrainedConfig:
    """Gemma 3 270M, with the default model's vocabulary: five layers of six with a window."""
    return Gemma3TextConfig(
        **COMMON,
        architectures=["Gemma3ForCausalLM"],
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
    )


def gpt_oss() -> PretrainedConfig:
    """Half of the layers with a window of 128 tokens, sinks, 2 of 8 experts for each token."""
    return GptOssConfig(
        **COMMON,
        architectures=["GptOssForCausalLM"],
        hidden_size=576,
        intermediate_size=576,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 8,
        num_local_experts=8,
        num_experts_per_tok=2,
    )


def qwen3_next() -> PretrainedConfig:
    """Three layers of four with a recurrent state (gated delta rule), 2 of 8 experts."""
    return Qwen3NextConfig(
        **COMMON,
        architectures=["Qwen3NextForCausalLM"],
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    )


SHAPES = {"gemma3": gemma3, "gpt-oss": gpt_oss, "qwen3-next": qwen3_next}


def write_shape(name: str, folder: Path) -> Path:
    """Write the configuration and the tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    SHAPES[name]().save_pretrained(folder)
    for file in TOKENIZER:
        if (source := default_model() / file).exists():
            shutil.copy(source, folder)
    return folder


if __name__ == "__main__":
    for name in SHAPES:
        print(write_shape(name, Path(sys.argv[1]) / name))
