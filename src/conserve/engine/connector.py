"""Our KV connector: carries safepoints and copy orders into the workers, and figures out.

It is the door through which every forward passes before each attention layer, through which
the scheduler's copy orders reach the workers and their reports come back, and the only carrier
of statistics from the engine to the API process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from conserve.engine.checkpoint.orders import Orders, Report
from conserve.engine.door import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorPromMetrics,
    KVConnectorRole,
    KVConnectorStats,
    SupportsHMA,
    get_kv_transfer_group,
    has_kv_transfer_group,
)
from conserve.engine.kept_states import Rows
from conserve.engine.recurrent_layers import watch
from conserve.engine.safepoints import StopStep
from conserve.engine.sides import SchedulerSide, WorkerSide
from conserve.engine.stats import EngineStats, PromMetrics, send_with


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers need to know of one step."""

    stoppable_step: int | None = None
    """The step's number if it may be stopped: said by the scheduler once it has built the step."""
    every: int = 1
    """Layers between two safepoints."""
    states: Rows = field(default_factory=dict)
    """Where the recurrent state lies that a stoppable step continues."""
    orders: Orders = field(default_factory=Orders)


class ConserveConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """vLLM makes one in the scheduler and one in each worker; each has its own side only."""

    scheduler_side: SchedulerSide
    worker_side: WorkerSide

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._begun: StepMetadata | None = None
        """Of the step whose copies have begun."""
        self._in_scheduler = role is KVConnectorRole.SCHEDULER
        if self._in_scheduler:
            self.scheduler_side = SchedulerSide.of(vllm_config, kv_cache_config)
        else:
            self.worker_side = WorkerSide.of(vllm_config, kv_cache_config)

    # In both

    def shutdown(self) -> None:
        if not self._in_scheduler:
            self.worker_side.copies.close()

    def get_kv_connector_stats(self) -> EngineStats | None:
        """The workers have no figures of their own."""
        return self.scheduler_side.stats.take() if self._in_scheduler else None

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # In the worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        layers = self._vllm_config.compilation_config.static_forward_context
        self.worker_side.copies.register(kv_caches, layers)
        watch(self.worker_side.states.register(layers), self._at_layer)

    def begin_copies(self, metadata: KVConnectorMetadata) -> None:
        """Before vLLM does anything of a step: it may overwrite blocks that have changed hands, or
        clear those that it hands out. Of another connector's metadata the part that is ours."""
        for one in (metadata, *getattr(metadata, "metadata", ())):
            if isinstance(one, StepMetadata) and one is not self._begun:
                self._begun = one
                self.worker_side.copies.begin_step(one.orders)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Where the worker is not ours, the first that is heard of a step. Model Runner V2 calls
        this when it has cleared new blocks."""
        self.begin_copies(kv_connector_metadata)

    def build_connector_worker_meta(self) -> Report | None:
        return self.worker_side.copies.report()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.worker_side.clock.launches()
        step = connector_metadata.stoppable_step
        if step is not None:
            self.worker_side.states.keep(connector_metadata.states)
            self.worker_side.safepoints.begin(step, connector_metadata.every)

    def clear_connector_metadata(self) -> None:
        self.worker_side.safepoints.end()
        super().clear_connector_metadata()

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._at_layer()

    def _at_layer(self) -> None:
        """Raises StopStep where the step is to stop, its recurrent state as it was before."""
        try:
            self.worker_side.safepoints.at_layer()
        except StopStep:
            self.worker_side.states.put_back()
            raise

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
        end = self.scheduler_side.checkpointer.num_restored_tokens(request.request_id)
        return (end - num_computed_tokens, True) if end > num_computed_tokens else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        checkpointer = self.scheduler_side.checkpointer
        if num_external_tokens and request.request_id in checkpointer.restoring:
            checkpointer.load(request, num_external_tokens, blocks.get_block_ids())

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        return StepMetadata(orders=self.scheduler_side.checkpointer.take_orders())

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if report is not None:
            self.scheduler_side.checkpointer.take(report)

    def reset_cache(self) -> bool:
        """The weights may have changed: what is on the host is worth nothing any more."""
        self.scheduler_side.checkpointer.forget_all()
        return True

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.scheduler_side.checkpointer.finished(request)
        return False, None

    # In the API process

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


def find_ours(connector: Any) -> ConserveConnector | None:
    """Ours, alone or among the children of vLLM's MultiConnector."""
    for one in (connector, *getattr(connector, "_connectors", ())):
        if isinstance(one, ConserveConnector):
            return one
    return None


def _ours_here() -> ConserveConnector | None:
    """In a worker."""
    return find_ours(get_kv_transfer_group()) if has_kv_transfer_group() else None


def settle_copies() -> None:
    """In a worker: come back when its copies are over. Whoever has vLLM wait for an idle device may
    take the KV caches' memory away next."""
    if ours := _ours_here():
        ours.worker_side.copies.settle()


@contextmanager
def nothing_pinned() -> Iterator[None]:
    """In a worker: no memory of the host is pinned meanwhile."""
    copies = ours.worker_side.copies if (ours := _ours_here()) else None
    if copies is not None:
        copies.hold(still=True)
    try:
        yield
    finally:
        if copies is not None:
            copies.hold(still=False)


def scheduler_side(connector: Any) -> SchedulerSide:
    """What our scheduler shares with our connector; its own where there is none."""
    ours = find_ours(connector)
    return ours.scheduler_side if ours else SchedulerSide.without_connector()


def hand_over(connector: Any, stats: EngineStats, outputs: dict[int, Any]) -> None:
    """vLLM collects figures before a step's requests have ended. What came since goes with the
    same outputs: the next step may be hours away. Without our connector figures go nowhere, and
    through a MultiConnector vLLM fetches them with the next outputs."""
    if isinstance(connector, ConserveConnector):
        send_with(outputs, connector.get_kv_connector_stats())
    elif find_ours(connector) is None:
        stats.reset()
