"""Latency profiles on disk: one JSON file a model, device, dtype and parallelism."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conserve.core.latency import LatencyModel, StepShape
from conserve.engine.door import VLLM_VERSION

FORMAT = 2
PARALLELISM = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "enable_expert_parallel",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
)
"""How a step is divided among ranks, in vLLM's words."""


class UnreadableProfileError(ValueError):
    """A profile file that is not one of ours, damaged, or of another format."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A fitted model, and the (shape, seconds) samples it was fitted to."""

    model: LatencyModel
    mean_error: float
    samples: list[tuple[StepShape, float]]


def identity(vllm_config: Any) -> dict[str, Any]:
    """What a step time depends on."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return {
        "format": FORMAT,
        "vllm": VLLM_VERSION,
        "model": str(model.model),
        "runner": model.runner_type,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "device": _device_name(),
        "num_threads": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", ""),
        "openmp": "iomp5" in os.environ.get("LD_PRELOAD", ""),
        **{name: getattr(parallel, name) for name in PARALLELISM},
        "model_runner": "v2" if vllm_config.use_v2_model_runner else "v1",
        "enforce_eager": bool(model.enforce_eager),
        "async_scheduling": bool(vllm_config.scheduler_config.async_scheduling),
    }


def _device_name() -> str:
    import torch

    from conserve.engine import cuda

    if name := cuda.device_name():
        return name
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {isa}, {len(os.sched_getaffinity(0))} cores"


def path_of(folder: str, vllm_config: Any) -> Path:
    words = identity(vllm_config)
    digest = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:12]
    return Path(folder) / f"{Path(words['model']).name}-{digest}.json"


def load(path: Path) -> Profile | None:
    """The stored profile, or None if there is none. Raises UnreadableProfileError."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableProfileError(f"{path}: {error}") from error
    try:
        stored = json.loads(text)
        if stored["identity"]["format"] != FORMAT:
            raise UnreadableProfileError(f"{path}: of another format")
        coefficients = [_number(value) for value in stored["coefficients"]]
        knee, margin = _number(stored["knee"]), _number(stored["margin"])
        model = LatencyModel.of(coefficients, knee, margin)
        samples = [
            (StepShape(num_tokens, pairs, num_decodes, context), _number(seconds))
            for num_tokens, pairs, num_decodes, context, seconds in stored["samples"]
        ]
        return Profile(model, _number(stored["mean_error"]), samples)
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableProfileError(f"{path}: {error}") from error


def _number(value: object) -> float:
    """Raises ValueError on anything but a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    if not 0 <= value < math.inf:
        raise ValueError(f"{value} is not a finite number of at least 0")
    return float(value)


def save(path: Path, vllm_config: Any, profile: Profile) -> None:
    """Written beside and renamed, so that a reader sees all of it or nothing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        "identity": identity(vllm_config),
        "coefficients": profile.model.coefficients,
        "knee": profile.model.knee,
        "margin": profile.model.margin,
        "mean_error": profile.mean_error,
        "samples": [
            [s.num_tokens, s.attention_pairs, s.num_decodes, s.decode_context, seconds]
            for s, seconds in profile.samples
        ],
    }
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
        try:
            json.dump(stored, part, indent=1)
            part.flush()
            os.replace(part.name, path)
        except BaseException:
            os.unlink(part.name)
            raise
