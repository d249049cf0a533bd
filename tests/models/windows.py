"""Small random models with layers that attend to a window, alone or beside full ones.

Weights are larger than the usual initialisation, so that outputs vary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tests.stops.tiny_llama import make_tokenizer

MAX_MODEL_LEN = 512
WINDOW = 80
"""Tokens: two blocks and a half."""


@dataclass(frozen=True)
class Windows:
    """A family: how its model is made, and in how many blocks its requests are short of them."""

    make: Callable[[Path], Path]
    num_groups: int
    num_blocks: int


def make_mistral(folder: Path) -> Path:
    """A window in every layer."""
    return _save(MistralForCausalLM(MistralConfig(**_sizes(), sliding_window=WINDOW)), folder)


def make_gemma3(folder: Path) -> Path:
    """Five layers with a window to a full one."""
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    config = Gemma3TextConfig(
        **_sizes(len(kinds)), sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=32
    )
    # Its embeddings are its head, too: larger ones would have each token say itself again.
    return _save(Gemma3ForCausalLM(config), folder, embedding_scale=0.05)


def make_gpt_oss(folder: Path) -> Path:
    """Every second layer with a window; sinks, and experts."""
    kinds = ["sliding_attention", "full_attention"] * 4
    config = GptOssConfig(
        **_sizes(len(kinds)),
        sliding_window=WINDOW,
        layer_types=kinds,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return _save(GptOssForCausalLM(config), folder)


def _sizes(num_layers: int = 8) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": MAX_MODEL_LEN,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save(model: Any, folder: Path, embedding_scale: float = 1.0) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                scale = embedding_scale if "embed" in name else 2.5 * weight.shape[-1] ** -0.5
                weight.normal_(0, scale, generator=generator)
            elif "q_norm" in name or "k_norm" in name:
                # Sharp attention: an average over all tokens is nearly the same for each.
                weight.fill_(2.0)
    model.float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


FAMILIES = {
    "mistral": Windows(make_mistral, num_groups=1, num_blocks=22),
    "gemma3": Windows(make_gemma3, num_groups=6, num_blocks=110),
    "gpt-oss": Windows(make_gpt_oss, num_groups=2, num_blocks=46),
}
