"""Sizes and weights of small random models, in which different prompts have different answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.models.family import MAX_MODEL_LEN
from tests.stops.tiny_llama import make_tokenizer


def sizes(num_layers: int = 8) -> dict[str, Any]:
    """What the configurations of decoders have in common."""
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


def save(model: Any, folder: Path, embedding_scale: float = 1.0) -> Path:
    """Draw the weights and write the model, with a tokenizer, in float32.

    With the usual initialisation a random model repeats one token for ever, and equal outputs
    would mean nothing. A model whose embeddings are its head, too, wants a small
    `embedding_scale`: else each token says itself again.
    """
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
