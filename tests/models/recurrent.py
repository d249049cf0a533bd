"""Small random models with recurrent layers, alone or beside full attention.

Weights are larger than the usual initialisation, so that outputs vary. What vLLM's CPU build
says of the families that it does not run stands in `NOT_ON_CPU`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.stops.tiny_llama import make_tokenizer

MAX_MODEL_LEN = 512
HIDDEN = 128
MAMBA2 = {"heads": 4, "head_size": 64, "state_size": 64}
"""Twice the hidden size in all."""
CHUNK = 32
"""Tokens that a Mamba 2 kernel takes together."""


@dataclass(frozen=True)
class Recurrent:
    """A family: how its model is made, and in what vLLM computes it on a CPU."""

    make: Callable[[Path], Path]
    num_groups: int
    dtype: str = "float32"


def make_mamba2(folder: Path) -> Path:
    """No attention at all."""
    config = Mamba2Config(
        **_tokens(),
        hidden_size=HIDDEN,
        num_hidden_layers=8,
        num_heads=MAMBA2["heads"],
        head_dim=MAMBA2["head_size"],
        state_size=MAMBA2["state_size"],
        n_groups=1,
        chunk_size=CHUNK,
    )
    return _save(Mamba2ForCausalLM(config), folder)


def make_granite4(folder: Path) -> Path:
    """Three Mamba 2 layers to one of attention; experts."""
    config = GraniteMoeHybridConfig(
        **_sizes(),
        **_mamba2("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups"),
        mamba_chunk_size=CHUNK,
        layer_types=(["mamba"] * 3 + ["attention"]) * 2,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=HIDDEN,
    )
    return _save(GraniteMoeHybridForCausalLM(config), folder)


def make_falcon_h1(folder: Path) -> Path:
    """Attention and Mamba 2 side by side in every layer."""
    config = FalconH1Config(
        **_sizes(),
        **_mamba2("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups"),
        mamba_d_ssm=2 * HIDDEN,
        mamba_chunk_size=CHUNK,
        head_dim=32,
    )
    return _save(FalconH1ForCausalLM(config), folder)


def make_nemotron_h(folder: Path) -> Path:
    """Mamba 2, attention and MLP as layers of their own."""
    kinds = ["linear_attention", "mlp", "full_attention", "mlp"] * 2
    sizes = {name: size for name, size in _sizes().items() if name != "num_hidden_layers"}
    config = NemotronHConfig(
        **sizes,
        **_mamba2("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"),
        chunk_size=CHUNK,
        layers_block_type=kinds,
        head_dim=32,
    )
    return _save(NemotronHForCausalLM(config), folder)


def make_qwen3_next(folder: Path) -> Path:
    """Three layers of gated delta rule to one of attention; experts. Heads of the delta rule are
    as large as the CPU kernel wants them."""
    config = Qwen3NextConfig(
        **_sizes(),
        head_dim=32,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )
    return _save(Qwen3NextForCausalLM(config), folder)


def _tokens() -> dict[str, Any]:
    tokenizer = make_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _sizes() -> dict[str, Any]:
    return {
        **_tokens(),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_MODEL_LEN,
    }


def _mamba2(heads: str, head_size: str, state_size: str, groups: str) -> dict[str, int]:
    """The sizes of Mamba 2 layers under a family's own names."""
    return {
        heads: MAMBA2["heads"],
        head_size: MAMBA2["head_size"],
        state_size: MAMBA2["state_size"],
        groups: 1,
    }


def _save(model: Any, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                continue
            if "embed" in name:
                scale = 1.0
            elif "conv1d" in name:
                scale = 0.5
            else:
                scale = 2.5 * weight.shape[-1] ** -0.5
            weight.normal_(0, scale, generator=generator)
    model.float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


FAMILIES = {
    "mamba2": Recurrent(make_mamba2, num_groups=1),
    "granite4": Recurrent(make_granite4, num_groups=4),
    "falcon-h1": Recurrent(make_falcon_h1, num_groups=2),
    "nemotron-h": Recurrent(make_nemotron_h, num_groups=2),
    # Its answers depend on what else is in a step: the kernel takes nothing more exact.
    "qwen3-next": Recurrent(make_qwen3_next, num_groups=4, dtype="bfloat16"),
}

NOT_ON_CPU = {
    "Mamba 1, Jamba": "'_OpNamespace' '_C' object has no attribute 'selective_scan_fwd'",
    "Bamba": "Layer 0 (linear_attention) does not dispatch through the Transformers attention "
    "interface and vLLM has no other way to handle it.",
    "Nemotron-H with experts": "is_act_and_mul=False is supported only for CUDA, XPU and ROCm "
    "for now",
    "Mamba 2 with prefix caching": "index 7 is out of bounds for dimension 0 with size 1",
}
"""Families -> the message with which vLLM 0.32 ends on a CPU."""
