"""Small random pooling models: encoders, and a decoder that is asked for vectors.

Weights are larger than the usual initialisation, so that different prompts have different vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from tests.stops.tiny_llama import make_model as make_decoder
from tests.stops.tiny_llama import make_tokenizer

MAX_MODEL_LEN = 512


@dataclass(frozen=True)
class Pooling:
    """A family: how its model is made, and what vLLM is told of it."""

    make: Any
    """(folder) -> the folder with the model in it."""
    task: str = "embed"
    options: dict[str, Any] = field(default_factory=dict)
    cuts_prompts: bool = False
    """Whether vLLM chunks its prompts."""


def make_encoder(folder: Path) -> Path:
    return _save(BertModel(_bert()), folder)


def make_reranker(folder: Path) -> Path:
    """One score for each pair of texts."""
    return _save(BertForSequenceClassification(_bert(num_labels=1)), folder)


def _bert(**more: Any) -> BertConfig:
    tokenizer = make_tokenizer()
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_MODEL_LEN,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def _save(model: Any, folder: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                scale = 1.0 if "embed" in name else 2.5 * weight.shape[1] ** -0.5
                weight.normal_(0, scale, generator=generator)
    model.float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def _as(pooling: str, **more: Any) -> dict[str, Any]:
    return {"convert": "embed", "pooler_config": {"seq_pooling_type": pooling}, **more}


FAMILIES = {
    "encoder": Pooling(make_encoder),
    "reranker": Pooling(make_reranker, task="classify"),
    "last": Pooling(make_decoder, options=_as("LAST"), cuts_prompts=True),
    "every-token": Pooling(
        make_decoder, task="token_embed", options=_as("LAST"), cuts_prompts=True
    ),
    "mean": Pooling(make_decoder, options=_as("MEAN")),
    "cls": Pooling(make_decoder, options=_as("CLS")),
    "non-causal": Pooling(make_decoder, options=_as("LAST", hf_overrides={"is_causal": False})),
}
