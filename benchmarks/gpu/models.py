"""Model folders made by code, where no hub can be reached: shapes with random weights."""

from __future__ import annotations

import json
import string
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
}
"""As config.json of meta-llama/Llama-3.1-8B has it (without its RoPE scaling, which costs nothing),
and one small enough for a CPU."""


def write_shape(name: str, folder: Path, dtype: str = "bfloat16") -> Path:
    """A folder with config and tokenizer, for `--load-format dummy`. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LLAMA | SHAPES[name] | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    _write_tokenizer(folder, SHAPES[name]["vocab_size"])
    return folder


def write_random_llama(folder: Path, dtype: str = "float32") -> Path:
    """The tiny shape with real weights, larger than usual: greedy text of small ones repeats one
    token for ever, and its equality would mean nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_shape("tiny", folder, dtype)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES["tiny"]))
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps(LLAMA | SHAPES["tiny"] | {"torch_dtype": dtype}, indent=1) + "\n"
    )
    return folder


def _write_tokenizer(folder: Path, size: int) -> None:
    """Words of four letters with a space before them, one a token."""
    words = ["".join(letters) for letters in product(string.ascii_lowercase, repeat=4)]
    tokens = ["<unk>", "<s>", "</s>", *(f"▁{word}" for word in words)][:size]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, "<unk>"))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{% for message in messages %} {{ message.content }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
