"""The vLLM arguments that turn the engine room on."""

from __future__ import annotations

from typing import Any

from conserve.engine.door import current_platform
from conserve.engine.settings import KEY, EngineSettings

SCHEDULER = "conserve.engine.scheduler.ConserveScheduler"
CONNECTOR = "ConserveConnector"
CONNECTOR_MODULE = "conserve.engine.connector"
CPU_WORKER = "conserve.engine.worker.ConserveCPUWorker"
GPU_WORKER = "conserve.engine.worker.ConserveGPUWorker"


def vllm_arguments(settings: EngineSettings) -> dict[str, Any]:
    """vLLM argument name -> value. Scheduling works without the worker and the connector, but
    then no step can be stopped and the engine's metrics stay inside it."""
    return {
        "scheduler_cls": SCHEDULER,
        "scheduling_policy": "priority",
        "worker_cls": CPU_WORKER if current_platform.is_cpu() else GPU_WORKER,
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": CONNECTOR_MODULE,
            "kv_role": "kv_both",
        },
        "additional_config": {KEY: settings.to_json_dict()},
    }
