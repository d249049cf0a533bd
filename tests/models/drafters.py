"""A small Llama that repeats itself, and layers that draft for it.

What a token says of the next one counts most, so that a drafter of one layer is right at times.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.stops.tiny_llama import HIDDEN, make_model

FAINT = 0.02
"""How loud layers are beside the tokens' embeddings."""
SHARP = 2.0
"""Of queries and keys that are the same embedding, so that a token attends to itself."""
Weights = dict[str, torch.Tensor]


def make_repeating(folder: Path) -> Path:
    """The model itself. Stretches of its answers come again."""
    model = LlamaForCausalLM.from_pretrained(make_model(folder))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(FAINT)
    model.save_pretrained(folder)
    return folder


def make_eagle(model: Path) -> Path:
    """One layer, which takes the next token's embedding and leaves the model's hidden state."""
    weights = {f"layers.0.{name}": weight for name, weight in _layer(_weights(model)).items()}
    del weights["layers.0.input_layernorm.weight"]
    weights["fc.weight"] = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], dim=1)
    return _save(model / "eagle", model, weights, num_hidden_layers=1)


def make_eagle3(model: Path) -> Path:
    """One layer, which attends to the embeddings of tokens, above all to the last one's, and takes
    little of hidden states of three layers of the model."""
    weights = {f"layers.0.{name}": weight for name, weight in _layer(_weights(model)).items()}
    of_embedding = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], dim=1)
    for name, scale in (("q", SHARP), ("k", SHARP), ("v", 1.0)):
        weights[f"layers.0.self_attn.{name}_proj.weight"] = scale * of_embedding
    weights["layers.0.self_attn.o_proj.weight"] = torch.eye(HIDDEN)
    weights["layers.0.hidden_norm.weight"] = torch.ones(HIDDEN)
    weights["norm.weight"] = torch.ones(HIDDEN)
    weights["lm_head.weight"] = _weights(model)["lm_head.weight"]
    weights["fc.weight"] = FAINT * torch.eye(HIDDEN).repeat(1, 3)
    heads = {"num_key_value_heads": 4, "num_hidden_layers": 1}
    return _save(model / "eagle3", model, weights, **heads)


def make_mimo(folder: Path) -> Path:
    """The same model in the words of MiMo, with a layer that predicts the token after the next."""
    weights = _weights(make_repeating(folder))
    weights |= {
        name.replace("weight", "bias"): torch.zeros(weight.shape[0])
        for name, weight in weights.items()
        if "self_attn" in name and "o_proj" not in name
    }
    layer, ones = _layer(weights), torch.ones(HIDDEN)
    layer |= {f"{name}_layernorm.weight": ones.clone() for name in ("token", "hidden", "final")}
    layer["input_proj.weight"] = torch.cat([torch.zeros(HIDDEN, HIDDEN), torch.eye(HIDDEN)], dim=1)
    weights |= {f"model.mtp_layers.0.{name}": weight for name, weight in layer.items()}
    return _save(
        folder,
        folder,
        weights,
        architectures=["MiMoForCausalLM"],
        model_type="qwen2",
        num_nextn_predict_layers=1,
    )


def _weights(model: Path) -> Weights:
    return load_file(model / "model.safetensors")


def _layer(weights: Weights) -> Weights:
    """Copies of those of the first layer, by their names within it."""
    within = "model.layers.0."
    return {
        name.removeprefix(within): weight.clone()
        for name, weight in weights.items()
        if name.startswith(within)
    }


def _save(folder: Path, model: Path, weights: Weights, **changes: object) -> Path:
    """Write weights, and the model's configuration with changes."""
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder
