"""Our KV connector: carries safepoints and copy orders into the workers, and figures out.

It is the door through which every forward passes before each attention layer, through which
the scheduler's copy orders reach the workers and their reports come back, and the only carrier
of statistics from the engine to the API process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conserve.core.plan import Plan
from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.orders import Orders, Report
from conserve.engine.checkpoint.workers import CheckpointWorker
from conserve.engine.door import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorPromMetrics,
    KVConnectorStats,
    SupportsHMA,
)
from conserve.engine.safepoints import Safepoints
from conserve.engine.settings import EngineSettings
from conserve.engine.stats import EngineStats, PromMetrics


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers need to know of one step."""

    stoppable_step: int | None = None
    """The step's number if it may be stopped."""
    every: int = 1
    """Layers between two safepoints."""
    orders: Orders = field(default_factory=Orders)


class ConserveConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Both halves: the scheduler's (`next_step`, statistics) and the worker's (`safepoints`)."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.next_step = StepMetadata()
        """Set by the scheduler before it builds a step."""
        self.stats = EngineStats()
        """Filled by the scheduler."""
        self.checkpointer: Checkpointer | None = None
        """Set by the scheduler."""
        self.safepoints: Safepoints | None = None
        """Set by the worker, before the first step."""
        settings = EngineSettings.of(vllm_config.additional_config)
        self.copies = CheckpointWorker(settings, getattr(kv_cache_config, "num_blocks", 0))

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # In the worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        layers = self._vllm_config.compilation_config.static_forward_context
        self.copies.register(kv_caches, layers)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Before the forward, which may overwrite blocks that have changed hands."""
        self.copies.begin_step(kv_connector_metadata.orders)

    def build_connector_worker_meta(self) -> Report | None:
        return self.copies.report()

    def shutdown(self) -> None:
        self.copies.close()

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
        """Loads begin with the step's other copies, in `handle_preemptions`."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Layers are not copied one by one, but blocks once a step is done."""

    def wait_for_save(self) -> None:
        """Copies go on beside the steps that follow."""

    # In the scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """What the plan brings back of the request beyond what the device still has."""
        keeper = self.checkpointer
        end = keeper.num_restored_tokens(request.request_id) if keeper else 0
        return (end - num_computed_tokens, True) if end > num_computed_tokens else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        keeper, name = self.checkpointer, request.request_id
        if keeper is not None and num_external_tokens and name in keeper.restoring:
            (block_ids,) = blocks.get_block_ids()
            keeper.load(request, num_external_tokens, block_ids)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        step, self.next_step = self.next_step, StepMetadata()
        if self.checkpointer is not None:
            step.orders = self.checkpointer.take_orders()
        return step

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if self.checkpointer is not None and report is not None:
            self.checkpointer.take(report)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self.checkpointer is not None:
            self.checkpointer.finished(request.request_id)
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


def spare_others(plan: Plan, output: Any) -> bool:
    """Whether the others have work in the scheduled step; it is then not stopped after all."""
    metadata = output.kv_connector_metadata
    busy = others_have_work(metadata)
    if busy and plan.stoppable:
        plan.stoppable = False
        for one in filter(_is_ours, metadata.metadata):
            one.stoppable_step = None
    return busy


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
