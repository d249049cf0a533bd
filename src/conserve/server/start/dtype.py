"""Which data type a CPU computes in where the user names none.

A processor without bfloat16 instructions multiplies it several times as slowly as float32, and one
with them multiplies it several times as quickly: docs/install.md has figures.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from conserve.server.errors import BadInputError
from conserve.server.start import hub
from conserve.server.start.amounts import gib

MULTIPLIES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Instructions that multiply bfloat16, as torch names them: two of x86, one of Arm."""
MAX_ISA = "ONEDNN_MAX_CPU_ISA"
BFLOAT16_ISAS = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")
"""Parts of the values of that variable that leave oneDNN one of these instructions."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the choice needs to know of a model."""

    name: str
    num_parameters: int | None = None
    """None where its files do not tell."""
    quantized: bool = False
    bfloat16_only: bool = False
    """Whether vLLM's CPU kernels for it compute in bfloat16 and nothing else."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A value for `--dtype`, its bytes a number, and the words for it at start."""

    dtype: str
    num_bytes: int
    words: str


def multiplies_bfloat16(capabilities: frozenset[str], max_isa: str = "") -> bool:
    """Whether this processor multiplies bfloat16. `max_isa` is the user's ONEDNN_MAX_CPU_ISA,
    which may keep the library that does it off the instructions."""
    allowed = not max_isa or any(part in max_isa.upper() for part in BFLOAT16_ISAS)
    return allowed and bool(MULTIPLIES & capabilities)


def multiplies_bfloat16_here() -> bool:
    return multiplies_bfloat16(cpu_capabilities(), os.environ.get(MAX_ISA, ""))


def cpu_capabilities() -> frozenset[str]:
    """The instruction sets of this processor, by torch's names."""
    import torch  # seconds to import, which a command with a bad flag should not take

    return frozenset(name for name, has in torch.cpu.get_capabilities().items() if has is True)


def facts_of(args: argparse.Namespace) -> ModelFacts:
    """Of `args.model_tag`, from its configuration and the headers of its weights."""
    from conserve.server import door

    config = door.hf_config(args)
    quantized = args.quantization or getattr(config, "quantization_config", None)
    text = getattr(config, "text_config", None) or config
    # vLLM's name for the layers that it computes with its kernels for gated delta nets.
    bfloat16_only = "linear_attention" in (getattr(text, "layer_types", None) or ())
    count = hub.num_parameters(args.model_tag, args.revision)
    names = args.served_model_name or [args.model_tag]
    return ModelFacts(names[0], count, quantized=bool(quantized), bfloat16_only=bfloat16_only)


def choose(given: str, facts: ModelFacts, *, multiplies: bool) -> Choice:
    """The user's `--dtype`, or what "auto" comes to on a CPU."""
    if given != "auto":
        return Choice(given, 4 if given in ("float32", "float") else 2, f"{given} as --dtype says")
    if facts.quantized:
        return Choice("auto", 2, "data type as its quantised weights need")
    if multiplies:
        return Choice("bfloat16", 2, "bfloat16")
    if facts.bfloat16_only:
        return Choice(
            "bfloat16",
            2,
            "bfloat16 (this processor multiplies it slowly; the model's kernels know nothing else)",
        )
    size = ""
    if count := facts.num_parameters:
        size = f": {gib(4 * count)} of weights instead of {gib(2 * count)}"
    return Choice("float32", 4, f"float32 (no bfloat16 instructions here{size})")


def check_fits(facts: ModelFacts, choice: Choice, free_bytes: int) -> None:
    """Raise BadInputError where a model fits `free_bytes`, but not in the type chosen for it."""
    count = facts.num_parameters
    if count is None or choice.num_bytes <= 2:
        return
    if 2 * count < free_bytes < choice.num_bytes * count:
        raise BadInputError(
            f"MODEL {facts.name!r} has {gib(4 * count)} of weights in {choice.dtype}, and "
            f"{gib(free_bytes)} are free for them. This processor has no bfloat16 "
            f"instructions; --dtype bfloat16 would take {gib(2 * count)} and be several times "
            "as slow. Choose that, a smaller model, or a smaller --kv-cache-memory-bytes."
        )
