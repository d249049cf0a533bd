"""The vLLM arguments that turn the engine room on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conserve.engine.door import current_platform
from conserve.engine.settings import KEY, EngineSettings

SCHEDULER = "conserve.engine.scheduler.ConserveScheduler"
CONNECTOR = "ConserveConnector"
CONNECTOR_MODULE = "conserve.engine.connector"
MULTI = "MultiConnector"
CPU_WORKER = "conserve.engine.cpu_worker.ConserveCPUWorker"
GPU_WORKER = "conserve.engine.gpu_worker.ConserveGPUWorker"


def vllm_arguments(
    settings: EngineSettings, their_connector: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """vLLM argument name -> value. Scheduling works without the worker and the connector, but
    then no step can be stopped and the engine's metrics stay inside it.

    their_connector: a KV connector of the user's, as `--kv-transfer-config` has it.
    """
    return {
        "scheduler_cls": SCHEDULER,
        "scheduling_policy": "priority",
        "worker_cls": CPU_WORKER if current_platform.is_cpu() else GPU_WORKER,
        "kv_transfer_config": connectors(their_connector),
        "additional_config": {KEY: settings.to_json_dict()},
    }


def connectors(theirs: Mapping[str, Any] | None) -> dict[str, Any]:
    """`--kv-transfer-config` with our connector: alone, or ahead of theirs in a MultiConnector.

    vLLM asks the children in order, and ours must look before another loads or saves a layer.
    What concerns the engine as a whole (its id, role, failure policy) is theirs.
    """
    ours = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
    }
    if not theirs or theirs.get("kv_connector") in (None, CONNECTOR):
        return ours
    extra = dict(theirs.get("kv_connector_extra_config", {}))
    if theirs["kv_connector"] == MULTI:
        children = list(extra.get("connectors", ()))
    else:
        # vLLM gives every child the engine id of the whole.
        children, extra = [{k: v for k, v in theirs.items() if k != "engine_id"}], {}
    if all(child.get("kv_connector") != CONNECTOR for child in children):
        children.insert(0, ours)
    whole = {k: v for k, v in theirs.items() if k != "kv_connector_module_path"}
    extra["connectors"] = children
    return {**whole, "kv_connector": MULTI, "kv_connector_extra_config": extra}
