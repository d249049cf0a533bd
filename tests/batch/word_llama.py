"""A small random Llama, made by code: every process of a real server, and answers in no time."""

from __future__ import annotations

import json
from pathlib import Path

VOCABULARY = 1024
MAX_MODEL_LEN = 512


def make_tiny_llama(folder: Path) -> Path:
    """Weights of a fixed seed and a tokenizer of the words w0, w1, ...; returns `folder`."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    described: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w0"}
    described |= {"eos_token": "w1", "unk_token": "w2", "model_max_length": MAX_MODEL_LEN}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder
