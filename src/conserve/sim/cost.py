"""What a step really takes, and the machine it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Protocol

from conserve.core.calibration import fit
from conserve.core.latency import LatencyModel, StepShape


class CostModel(Protocol):
    """The truth about step times: a fitted LatencyModel is one, a Roofline another.

    Immutable and hashable, so that the profile of it is fitted once.
    """

    def __hash__(self) -> int: ...

    def predict_s(self, shape: StepShape) -> float:
        """Seconds the step takes on average; 0 for an empty one."""
        ...


MOST_BLOCKS = 10**7
"""Each takes some hundred bytes of memory here; a node of the largest GPUs has a tenth."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One engine: a model on its device or devices."""

    num_blocks: int
    block_size: int = 16
    max_running: int = 256
    """Slots (vLLM's max_num_seqs)."""
    max_step_tokens: int = 2048
    """vLLM's max_num_batched_tokens."""
    chunked_prefill: bool = True
    """False: a prompt is computed in one step or not at all."""
    max_adapters: int | None = None
    """LoRA adapters in a step (vLLM's max_loras); None where there are none."""
    fixed_step_tokens: int = 0
    """The budget of arms that have a fixed one; 0 leaves them their own."""
    num_layers: int = 32
    kv_bytes_per_token: int = 0
    link_bytes_per_s: float = 0.0
    """Device to host and host to device, each way; 0 means that nothing is checkpointed."""
    gap_s: float = 0.0
    """Between two steps where scheduling is not overlapped with the forward."""
    frontend_s: float = 0.0
    """From the client to the engine and back, together."""
    safepoint_layers: int = 0
    """A stoppable step looks at the stop signal at every so many layers; 0: as often as
    `core.looks` says."""
    safepoint_s: float = 0.0
    """What one look costs."""
    noise: float = 0.0
    """Standard deviation of the logarithm of step times around the cost model."""

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_running", "max_step_tokens", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in (
            "fixed_step_tokens", "link_bytes_per_s", "gap_s", "frontend_s", "safepoint_layers",
            "safepoint_s", "noise",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.num_blocks > MOST_BLOCKS:
            raise ValueError(f"num_blocks must be at most {MOST_BLOCKS:,}, not {self.num_blocks:,}")
        if self.max_adapters is not None and self.max_adapters < 1:
            raise ValueError(f"max_adapters must be at least 1, not {self.max_adapters}")
        if self.link_bytes_per_s and self.kv_bytes_per_token < 1:
            raise ValueError("a host link needs kv_bytes_per_token")


class Clockwork:
    """Draws true step times: the cost model, with seeded noise if the machine has any."""

    def __init__(self, cost: CostModel, machine: Machine, seed: int) -> None:
        self._cost = cost
        self._machine = machine
        self._rng = Random(seed)  # noqa: S311  (a simulation, no secret)

    def step_s(self, shape: StepShape, num_looks: int = 0) -> float:
        """Seconds, with `num_looks` at the stop signal."""
        seconds = self._cost.predict_s(shape)
        if self._machine.noise:
            seconds *= self._rng.lognormvariate(0.0, self._machine.noise)
        return seconds + num_looks * self._machine.safepoint_s


@lru_cache(maxsize=32)
def profiled_model(cost: CostModel, max_step_tokens: int) -> LatencyModel:
    """The latency model a server fits at start, from a short profile of the true costs."""
    if isinstance(cost, LatencyModel):
        return cost
    samples = [(shape, cost.predict_s(shape)) for shape in profile_shapes(max_step_tokens)]
    return fit(samples)


def profile_shapes(max_step_tokens: int) -> list[StepShape]:
    """Prefills of several sizes and contexts, decodes of several counts and contexts, and both."""
    shapes = []
    sizes = [n for n in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= max_step_tokens]
    for size in sizes:
        for context in (0, 1024, 8192):
            shape = StepShape()
            shape.add_prefill(size, context)
            shapes.append(shape)
    for count in (1, 16, 64, 256):
        for context in (64, 1024, 4096):
            shape = StepShape()
            for _ in range(count):
                shape.add_decode(1, context)
            shapes.append(shape)
    for size in sizes[-3:]:
        for count in (16, 64):
            shape = StepShape()
            for _ in range(count):
                shape.add_decode(1, 1024)
            shape.add_prefill(size - count if size > count else 1, 2048)
            shapes.append(shape)
    return shapes
