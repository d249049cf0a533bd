"""A model with weights and activations of 8 bits, as compressed-tensors writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models.family import Family
from tests.stops.tiny_llama import make_model

WEIGHTS = "model.safetensors"
EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
HOW = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
}


def make_w8a8(folder: Path) -> Path:
    make_model(folder)
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / WEIGHTS).items():
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            weights[f"{name}_scale"] = scale
            weights[name] = (weight / scale).round().to(torch.int8)
        else:
            weights[name] = weight
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": HOW}))
    return folder


FAMILIES = {
    "Llama in 8 bits (W8A8)": Family("full attention", make_w8a8, num_blocks=40),
}
