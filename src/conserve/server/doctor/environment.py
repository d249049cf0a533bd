"""Environment variables that change what we, vLLM or torch do, without what is secret in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from conserve.server.doctor.finding import Finding
from conserve.server.doctor.secrets import MASK, is_secret, mask_flags

SECTION = "settings"
PREFIXES = (
    "AWS_",
    "CONSERVE_",
    "CUDA_",
    "GLOO_",
    "HF_",
    "KMP_",
    "MKL_",
    "NCCL_",
    "NVIDIA_",
    "OMP_",
    "ONEDNN_",
    "OPENAI_",
    "OTEL_",
    "PYTORCH_",
    "RAY_",
    "TORCH",
    "TRANSFORMERS_",
    "VLLM_",
)
NAMES = ("LD_PRELOAD", "XDG_CACHE_HOME", "XDG_DATA_HOME", "PYTHONPATH")


def environment(environ: Mapping[str, str], words: Sequence[str]) -> Iterator[Finding]:
    """The flags given, and the variables that concern us."""
    yield Finding(SECTION, "flags", " ".join(mask_flags(words)) or "none")
    concern = [name for name in sorted(environ) if _concerns_us(name)]
    for name in concern:
        value = environ[name]
        yield Finding(SECTION, name, MASK if is_secret(name, value) else value)
    if not concern:
        yield Finding(SECTION, "environment", "no variable that concerns us")


def _concerns_us(name: str) -> bool:
    return name.startswith(PREFIXES) or name in NAMES or name.lower().endswith("_proxy")
