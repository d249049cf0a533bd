"""Models with recurrent layers, alone or beside attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)

from tests.models.family import ON, Family
from tests.models.weights import save, sizes

CHUNK = 32
"""Tokens that a Mamba 2 kernel takes together."""


def make_mamba2(folder: Path) -> Path:
    config = Mamba2Config(
        **_sizes(("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")),
        **_mamba2("num_heads", "head_dim", "state_size", "n_groups"),
        chunk_size=CHUNK,
    )
    return save(Mamba2ForCausalLM(config), folder)


def make_granite4(folder: Path) -> Path:
    config = GraniteMoeHybridConfig(
        **sizes(),
        **_mamba2("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups"),
        mamba_chunk_size=CHUNK,
        layer_types=(["mamba"] * 3 + ["attention"]) * 2,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=128,
    )
    return save(GraniteMoeHybridForCausalLM(config), folder)


def make_falcon_h1(folder: Path) -> Path:
    config = FalconH1Config(
        **sizes(),
        **_mamba2("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups"),
        mamba_d_ssm=256,
        mamba_chunk_size=CHUNK,
    )
    return save(FalconH1ForCausalLM(config), folder)


def make_nemotron_h(folder: Path) -> Path:
    return _nemotron_h(folder, "mlp")


def make_nemotron_h_with_experts(folder: Path) -> Path:
    return _nemotron_h(folder, "moe", n_routed_experts=4, num_experts_per_tok=2)


def _nemotron_h(folder: Path, other: str, **options: Any) -> Path:
    config = NemotronHConfig(
        **_sizes(("num_hidden_layers",)),
        **_mamba2("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"),
        chunk_size=CHUNK,
        layers_block_type=["linear_attention", other, "full_attention", other] * 2,
        **options,
    )
    return save(NemotronHForCausalLM(config), folder)


def make_mamba1(folder: Path) -> Path:
    without = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    return save(MambaForCausalLM(MambaConfig(**_sizes(without), state_size=16)), folder)


def make_jamba(folder: Path) -> Path:
    config = JambaConfig(
        **_sizes(("head_dim",)),
        attn_layer_period=4,
        attn_layer_offset=3,
        num_experts=4,
        num_experts_per_tok=2,
        use_mamba_kernels=False,
    )
    return save(JambaForCausalLM(config), folder)


def make_bamba(folder: Path) -> Path:
    config = BambaConfig(
        **_sizes(("head_dim",)),
        **_mamba2("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups"),
        mamba_chunk_size=CHUNK,
        attn_layer_indices=[3, 7],
    )
    return save(BambaForCausalLM(config), folder)


def _sizes(without: tuple[str, ...]) -> dict[str, Any]:
    return {name: size for name, size in sizes().items() if name not in without}


def _mamba2(heads: str, head_size: str, state_size: str, groups: str) -> dict[str, int]:
    """The sizes of Mamba 2 layers under a family's own names."""
    return {heads: 4, head_size: 64, state_size: 16, groups: 1}


NO_CACHE = {"enable_prefix_caching": False}
"""With it vLLM's CPU kernels of Mamba 2 end the engine where a prompt's last step passes the end of
a block: "index 6 is out of bounds for dimension 0 with size 1"."""

NO_SCAN = "object has no attribute 'selective_scan_fwd'"

FAMILIES = {
    "Mamba 2": Family("recurrent, no attention", make_mamba2, num_blocks=5, states=ON),
    "Granite 4": Family(
        "three recurrent layers (Mamba 2) to one with attention; experts",
        make_granite4,
        num_groups=4,
        num_blocks=40,
        states=ON,
        options=NO_CACHE,
    ),
    "Falcon H1": Family(
        "attention and Mamba 2 side by side in every layer",
        make_falcon_h1,
        num_groups=2,
        num_blocks=30,
        states=ON,
        options=NO_CACHE,
    ),
    "Nemotron-H": Family(
        "Mamba 2, attention and MLP as layers of their own",
        make_nemotron_h,
        num_groups=2,
        num_blocks=30,
        states=ON,
        options=NO_CACHE,
    ),
    "Nemotron-H with experts": Family(
        "Mamba 2, attention and experts as layers of their own",
        make_nemotron_h_with_experts,
        refusal="is_act_and_mul=False is supported only for CUDA, XPU and ROCm for now",
    ),
    "Bamba": Family(
        "three recurrent layers (Mamba 2) to one with attention",
        make_bamba,
        refusal="does not dispatch through the Transformers attention interface",
    ),
    "Mamba 1": Family("recurrent, no attention", make_mamba1, refusal=NO_SCAN),
    "Jamba": Family(
        "three recurrent layers (Mamba 1) to one with attention; experts",
        make_jamba,
        refusal=NO_SCAN,
    ),
}
