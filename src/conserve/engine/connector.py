"""Our KV connector: carries safepoints into the workers and the engine's figures out of it.

It moves no KV. It is the door through which every forward passes before each attention
layer, and the only carrier of statistics from the engine to the API process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from conserve.engine.door import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorPromMetrics,
    KVConnectorStats,
    SupportsHMA,
)
from conserve.engine.safepoints import Safepoints
from conserve.engine.stats import EngineStats, PromMetrics


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers need to know of one step."""

    stoppable_step: int | None = None
    """The step's number if it may be stopped."""
    every: int = 1
    """Layers between two safepoints."""


class ConserveConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Both halves: the scheduler's (`next_step`, statistics) and the worker's (`safepoints`)."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.next_step = StepMetadata()
        """Set by the scheduler before it builds a step."""
        self.stats = EngineStats()
        """Filled by the scheduler."""
        self.safepoints: Safepoints | None = None
        """Set by the worker, before the first step."""

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # In the worker

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        step = connector_metadata.stoppable_step
        if step is not None and self.safepoints is not None:
            self.safepoints.begin(step, connector_metadata.every)

    def clear_connector_metadata(self) -> None:
        if self.safepoints is not None:
            self.safepoints.end()
        super().clear_connector_metadata()

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self.safepoints is not None:
            self.safepoints.at_layer()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    # In the scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is loaded into the blocks."""

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        step, self.next_step = self.next_step, StepMetadata()
        return step

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    # Statistics, from the engine process to the API process

    def get_kv_connector_stats(self) -> EngineStats | None:
        if self.stats.is_empty():
            return None
        stats, self.stats = self.stats, EngineStats()
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return EngineStats(data=data) if data else EngineStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def others_have_work(metadata: Any) -> bool:
    """Whether a step asks anything of the connectors beside ours in vLLM's MultiConnector.

    A connector learns from a step's metadata what to load and save in it, and believes it done
    when the step is over: such a step must not be stopped. The metadata is opaque; what equals
    a fresh one of its type asks nothing.
    """
    others = (one for one in getattr(metadata, "metadata", ()) if not _is_ours(one))
    return any(_asks_something(one) for one in others)


def never_stop(metadata: Any) -> None:
    """Take back that the step of that metadata may be stopped."""
    for one in (metadata, *getattr(metadata, "metadata", ())):
        if _is_ours(one):
            one.stoppable_step = None


def _is_ours(metadata: Any) -> bool:
    return isinstance(metadata, StepMetadata)


def _asks_something(metadata: Any) -> bool:
    try:
        return bool(vars(metadata) != vars(type(metadata)()))
    except TypeError:  # it cannot be made without arguments, or keeps no attributes
        return True


def find_ours(connector: Any) -> ConserveConnector | None:
    """Ours, alone or among the children of vLLM's MultiConnector."""
    for one in (connector, *getattr(connector, "_connectors", ())):
        if isinstance(one, ConserveConnector):
            return one
    return None
