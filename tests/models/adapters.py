"""A model with two LoRA adapters."""

from __future__ import annotations

from pathlib import Path

from tests.models.family import Asked, Family, texts
from tests.stops.tiny_llama import LORA_RANK, make_lora, make_model

NAMES = ("a", "b")


def make_with_adapters(folder: Path) -> Path:
    for number, name in enumerate(NAMES, 1):
        make_lora(folder / name, seed=number)
    return make_model(folder)


def ask_by_turns(model: Path) -> list[Asked]:
    """Of one adapter, then of the other."""
    from vllm.lora.request import LoRARequest

    adapters = [LoRARequest(name, 1 + i, str(model / name)) for i, name in enumerate(NAMES)]
    return [
        {**asked, "lora_request": adapters[i % len(adapters)]}
        for i, asked in enumerate(texts(model))
    ]


FAMILIES = {
    "Llama with LoRA adapters": Family(
        "full attention; one adapter in a step",
        make_with_adapters,
        num_blocks=40,
        ask=ask_by_turns,
        options={
            "enable_lora": True,
            "max_loras": 1,
            "max_cpu_loras": 2,
            "max_lora_rank": LORA_RANK,
        },
    ),
}
