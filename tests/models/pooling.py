"""Models that give vectors and scores: encoders, and a decoder that is asked for vectors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertForSequenceClassification, BertModel

from tests.models.family import MAX_MODEL_LEN, Family, texts
from tests.models.weights import save
from tests.stops.tiny_llama import make_model as make_decoder
from tests.stops.tiny_llama import make_tokenizer

NO_KV = "the model keeps no KV"
NOT_KEPT = "a pooling model keeps no KV"


def make_encoder(folder: Path) -> Path:
    return save(BertModel(_bert()), folder)


def make_reranker(folder: Path) -> Path:
    """One score for each pair of texts."""
    return save(BertForSequenceClassification(_bert(num_labels=1)), folder)


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


def pooling(layers: str, make: Any, as_decoder: dict[str, Any], **more: Any) -> Family:
    """`as_decoder`: what makes vLLM ask a decoder for vectors."""
    options = {
        "runner": "pooling",
        # A whole prompt fits in a step, slots are few, and nothing is short of blocks.
        "max_num_batched_tokens": MAX_MODEL_LEN,
        "max_num_seqs": 4,
        "num_gpu_blocks_override": None,
        **as_decoder,
    }
    about = {"task": "embed", "checkpoints": NOT_KEPT, "cuts_prompts": False, **more}
    return Family(layers, make, options=options, ask=partial(texts, least=20, most=500), **about)


def _as(kind: str, **more: Any) -> dict[str, Any]:
    return {"convert": "embed", "pooler_config": {"seq_pooling_type": kind}, **more}


NO_CAUSE = _as("LAST", hf_overrides={"is_causal": False})
FAMILIES = {
    "BERT": pooling(
        "no KV; CLS pooling", make_encoder, {}, num_groups=0, checkpoints=NO_KV, always=True
    ),
    "reranker": pooling(
        "no KV; a score of two texts",
        make_reranker,
        {},
        task="classify",
        num_groups=0,
        checkpoints=NO_KV,
    ),
    "decoder, LAST pooling": pooling(
        "full attention", make_decoder, _as("LAST"), cuts_prompts=True
    ),
    "decoder, a vector for every token": pooling(
        "full attention", make_decoder, _as("LAST"), task="token_embed", cuts_prompts=True
    ),
    "decoder, MEAN pooling": pooling("full attention", make_decoder, _as("MEAN"), always=True),
    "decoder, CLS pooling": pooling("full attention", make_decoder, _as("CLS")),
    "decoder without causal attention": pooling(
        "no KV", make_decoder, NO_CAUSE, num_groups=0, checkpoints=NO_KV
    ),
}
