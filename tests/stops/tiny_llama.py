"""A small random Llama with a tokenizer, a chat template and a LoRA adapter, made by code.

Weights are larger than the usual initialisation: with that, a random model repeats one token
for ever, and equal outputs would mean nothing. Heads divide by two, for tensor parallelism.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN = 128
NUM_LAYERS = 12
LORA_RANK = 8
MAX_MODEL_LEN = 2048
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_model(folder: Path, seed: int = 0) -> Path:
    """Write the model into `folder`; every printable character is one token."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=NUM_LAYERS,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                scale = 1.0 if "embed" in name else 2.5 * weight.shape[1] ** -0.5
                weight.normal_(0, scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_lora(folder: Path, seed: int = 1) -> Path:
    """Write a random adapter of the attention projections into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q_proj": HIDDEN, "v_proj": HIDDEN // 2}
    weights = {}
    for layer in range(NUM_LAYERS):
        for name, size in sizes.items():
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{path}.lora_A.weight"] = torch.randn(LORA_RANK, HIDDEN, generator=generator)
            weights[f"{path}.lora_B.weight"] = torch.randn(size, LORA_RANK, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": LORA_RANK,
        "lora_alpha": LORA_RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(sizes),
        "base_model_name_or_path": "tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def random_text(chance: object, length: int) -> str:
    """`length` printable characters, so as many tokens; `chance` is a random.Random."""
    return "".join(chance.choices(string.ascii_letters + "    .,", k=length))  # type: ignore[attr-defined]
