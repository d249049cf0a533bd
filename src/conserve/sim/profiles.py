"""Profiles: a machine and its step times, by name or from a file."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from conserve.core.latency import LatencyModel, StepShape
from conserve.sim.cost import CostModel, Machine
from conserve.sim.roofline import BYTES, Gpu, ModelShape, Roofline
from conserve.workload import unknown_name

MEMORY_SHARE = 0.9
"""Of a GPU's memory that the server may use (vLLM's gpu_memory_utilization)."""
ACTIVATION_BYTES = 2e9
"""A GPU, besides weights and KV: an assumption."""
BLOCK_SIZE = 16

Spec = TypeVar("Spec")


class ProfileError(ValueError):
    """A profile that does not exist or cannot be used; says which field and what is known."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A machine to simulate. `about` says where its numbers come from."""

    name: str
    about: str
    machine: Machine
    cost: CostModel


def load_profile(name: str) -> Profile:
    """`GPU[xN]/MODEL` (roofline of N tensor-parallel GPUs), or the path of a .toml file.

    Raises ProfileError.
    """
    if name.endswith(".toml"):
        return _from_file(Path(name))
    gpu_name, slash, model_name = name.partition("/")
    if not slash:
        raise ProfileError(
            f"{name!r} is no profile: give GPU/MODEL (like h100/llama-3.1-8b or "
            "h100x4/llama-3.1-70b) or the path of a .toml file"
        )
    gpu_name, _, count = gpu_name.partition("x") if "x" in gpu_name else (gpu_name, "", "1")
    if not count.isdecimal() or int(count) < 1:
        raise ProfileError(f"{name!r}: {count!r} is no number of GPUs")
    gpu = _spec(Gpu, "gpus", gpu_name)
    model = _spec(ModelShape, "models", model_name)
    return _analytic(name, gpu, model, int(count))


def known_names(kind: str) -> list[str]:
    """What `gpus` or `models` may be named."""
    return sorted(_tables(kind))


def _tables(kind: str) -> dict[str, dict[str, Any]]:
    text = files("conserve.sim").joinpath("profiles", f"{kind}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _spec(cls: type[Spec], kind: str, name: str) -> Spec:
    tables = _tables(kind)
    if name not in tables:
        raise ProfileError(unknown_name(kind.removesuffix("s"), name, known_names(kind)))
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{key: value for key, value in tables[name].items() if key in known})


def _analytic(name: str, gpu: Gpu, model: ModelShape, num_gpus: int) -> Profile:
    room = num_gpus * (gpu.memory_bytes * MEMORY_SHARE - ACTIVATION_BYTES)
    room -= BYTES * model.held_weights
    num_blocks = int(room // (BLOCK_SIZE * model.kv_bytes_per_token))
    if num_blocks < 1:
        need = BYTES * model.held_weights / 1e9
        raise ProfileError(
            f"{name}: {need:.0f} GB of weights leave no memory for KV: use more GPUs"
        )
    machine = Machine(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_running=gpu.default_max_running,
        max_step_tokens=gpu.default_step_tokens,
        num_layers=model.num_layers,
        kv_bytes_per_token=model.kv_bytes_per_token,
        link_bytes_per_s=gpu.link_bytes_per_s * num_gpus,
        safepoint_s=gpu.safepoint_s if num_gpus == 1 else gpu.safepoint_parallel_s,
    )
    return Profile(name, "analytic (roofline)", machine, Roofline(gpu, model, num_gpus))


def _from_file(path: Path) -> Profile:
    """A measured profile: `about`, [machine] with Machine's fields, [cost] with LatencyModel's.

    Or [cost] names, as `profile`, a file that `conserve serve` wrote, beside this one.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"{path}: {error}") from error
    for key in ("machine", "cost"):
        if not isinstance(table.get(key), dict):
            raise ProfileError(f"{path}: no table [{key}]")
    cost_table = table["cost"]
    if "profile" in cost_table:
        cost, noise = _served(path.parent / str(cost_table["profile"]))
        table["machine"].setdefault("noise", noise)
    else:
        cost = _build(LatencyModel, cost_table, f"{path}: cost")
        _check_times(cost, f"{path}: cost")
    machine = _build(Machine, table["machine"], f"{path}: machine")
    return Profile(path.stem, str(table.get("about", "measured")), machine, cost)


def _served(path: Path) -> tuple[LatencyModel, float]:
    """The model in a profile that `conserve serve` wrote, and the spread of its samples around it.

    The spread is that of a normal log(actual / predicted) with the samples' mean absolute value
    (sigma = mean |x| * sqrt(pi / 2)), so that a few disturbed samples do not make all steps noisy.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        model = LatencyModel.of(stored["coefficients"], stored["knee"], stored["margin"])
        _check_times(model, str(path))
        logs = [
            abs(math.log(seconds / model.predict_s(StepShape(*shape))))
            for *shape, seconds in stored["samples"]
        ]
    except ProfileError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ProfileError(f"{path}: no profile of conserve serve: {error!r}") from error
    mean = sum(logs) / len(logs) if logs else 0.0
    return model, round(mean * math.sqrt(math.pi / 2), 4)


def _check_times(model: LatencyModel, where: str) -> None:
    """Raise ProfileError for step times that no machine has."""
    for field in fields(LatencyModel):
        value = getattr(model, field.name)
        if not 0 <= value < math.inf:
            raise ProfileError(f"{where}: {field.name} must be 0 or more, not {value}")
    token = StepShape()
    token.add_decode(1, 0)
    if not min(model.predict_s(token), model.predict_prefill_s(1)) > 0:
        raise ProfileError(f"{where}: steps take no time: fixed or per_token must be above 0")


def _build(cls: type[Spec], values: Mapping[str, Any], where: str) -> Spec:
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in known:
            raise ProfileError(f"{where}: {unknown_name('key', key, list(known))}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ProfileError(f"{where}: {key} must be a number, not {value!r}")
        if isinstance(value, float) and str(known[key].type).startswith("int"):
            raise ProfileError(f"{where}: {key} must be a whole number, not {value!r}")
    for key, field in known.items():
        if key not in values and field.default is MISSING:
            raise ProfileError(f"{where}: {key} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise ProfileError(f"{where}: {error}") from error
