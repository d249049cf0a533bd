"""The two sides of our connector: what each process that has one keeps in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.sizes import PoolSize, make_checkpointer, no_checkpoints
from conserve.engine.checkpoint.workers import CheckpointWorker
from conserve.engine.cuda import CudaMarks, make_event
from conserve.engine.flag import StopFlag, flag_name
from conserve.engine.kept_states import KeptStates
from conserve.engine.safepoints import DeviceEvent, Safepoints
from conserve.engine.settings import EngineSettings
from conserve.engine.stats import EngineStats
from conserve.engine.step_times import HostMark, StepClock


@dataclass(frozen=True)
class SchedulerSide:
    """In the engine process, shared by the connector and our scheduler."""

    checkpointer: Checkpointer
    stats: EngineStats = field(default_factory=EngineStats)
    """Figures on their way to the API process."""

    @classmethod
    def of(cls, vllm_config: Any, kv_cache_config: Any) -> SchedulerSide:
        stats = EngineStats()
        settings = EngineSettings.of(vllm_config.additional_config)
        return cls(make_checkpointer(vllm_config, kv_cache_config, settings, stats), stats)

    @classmethod
    def without_connector(cls) -> SchedulerSide:
        """Nothing carries orders to the workers, nor figures to the API process."""
        return cls(no_checkpoints("no ConserveConnector is configured (use `conserve serve`)"))


@dataclass(frozen=True)
class WorkerSide:
    """On one rank."""

    safepoints: Safepoints
    clock: StepClock
    copies: CheckpointWorker
    states: KeptStates

    @classmethod
    def of(cls, vllm_config: Any, kv_cache_config: Any) -> WorkerSide:
        settings = EngineSettings.of(vllm_config.additional_config)
        size = PoolSize.of(vllm_config, kv_cache_config, settings)
        on_cuda = vllm_config.device_config.device_type == "cuda"
        return cls(
            _safepoints(vllm_config, settings, make_event if on_cuda else None),
            StepClock(CudaMarks() if on_cuda else HostMark),
            CheckpointWorker(settings, size, kv_cache_config.num_blocks),
            KeptStates(vllm_config, kv_cache_config),
        )


def _safepoints(
    vllm_config: Any, settings: EngineSettings, make_event: Callable[[], DeviceEvent] | None
) -> Safepoints:
    flag = StopFlag(flag_name(vllm_config), rank_timeout_s=settings.rank_timeout_s)
    return Safepoints(flag, vllm_config.parallel_config.rank, make_event)
