"""Step times from published shapes: what a GPU can do, and what a model asks of it."""

from __future__ import annotations

from dataclasses import dataclass

from conserve.core.latency import StepShape

BYTES = 2
"""Of a weight or KV element in bfloat16."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device. Rates are the data sheet's; efficiencies say what share of them kernels reach."""

    flops: float
    """Dense bfloat16 operations a second."""
    bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    """Measured or assumed rate of bulk copies to pinned host memory."""
    peer_bytes_per_s: float
    """To the other devices of a tensor-parallel group, one way."""
    matmul_efficiency: float
    attention_efficiency: float
    bytes_efficiency: float
    step_s: float
    """Launching, sampling and copying of a step, whatever is in it."""
    safepoint_s: float
    """One look at the stop signal."""
    safepoint_parallel_s: float
    """The same where tensor-parallel ranks have to agree."""
    default_step_tokens: int
    default_max_running: int

    def __post_init__(self) -> None:
        for name in ("matmul_efficiency", "attention_efficiency", "bytes_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder with grouped-query attention and a gated MLP."""

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        attention = self.hidden * self.head_size * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def read_weights(self) -> int:
        """Weights that a step reads whole: the layers and the output matrix."""
        return self.num_layers * self.layer_weights + self.vocabulary * self.hidden

    @property
    def held_weights(self) -> int:
        """Those and the input embeddings."""
        return self.read_weights + self.vocabulary * self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * BYTES * self.num_layers * self.num_kv_heads * self.head_size


@dataclass(frozen=True, slots=True)
class Roofline:
    """Seconds of a step on `num_gpus` tensor-parallel devices.

    T = step_s + max(matmul operations / rate, weight bytes / rate)
        + prefill attention operations / rate + KV bytes read by decodes / rate + all-reduces

    A matmul takes 2 operations a weight and token; attention takes 4 * heads * head_size a
    layer and query-key pair (scores and values); a layer has two all-reduces, each moving
    2 * (g - 1) / g of its activations in a ring.
    """

    gpu: Gpu
    model: ModelShape
    num_gpus: int = 1

    def predict_s(self, shape: StepShape) -> float:
        if not shape.num_tokens:
            return 0.0
        gpu, model, share = self.gpu, self.model, 1 / self.num_gpus
        operations = 2.0 * model.num_layers * model.layer_weights * shape.num_tokens
        matmul_s = operations * share / (gpu.flops * gpu.matmul_efficiency)
        bytes_per_s = gpu.bytes_per_s * gpu.bytes_efficiency
        weights_s = BYTES * model.read_weights * share / bytes_per_s
        pairs = 4.0 * model.num_layers * model.num_heads * model.head_size * shape.attention_pairs
        attention_s = pairs * share / (gpu.flops * gpu.attention_efficiency)
        decode_s = model.kv_bytes_per_token * shape.decode_context * share / bytes_per_s
        return (
            gpu.step_s
            + max(matmul_s, weights_s)
            + attention_s
            + decode_s
            + self._all_reduce_s(shape.num_tokens)
        )

    def _all_reduce_s(self, num_tokens: int) -> float:
        if self.num_gpus == 1:
            return 0.0
        activations = BYTES * self.model.hidden * num_tokens
        moved = 2 * (self.num_gpus - 1) / self.num_gpus * activations
        rate = self.gpu.peer_bytes_per_s * self.gpu.bytes_efficiency
        return 2 * self.model.num_layers * moved / rate
