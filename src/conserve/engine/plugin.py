"""vLLM's general plugin: hooks our scheduler into the engine process, and what it knows of a
request into the API process's spans. Loaded by every process, workers too."""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

from conserve.engine.compile_hash import leave_out_settings
from conserve.engine.faults import write_faults
from conserve.engine.flag import choose_secret
from conserve.engine.phases import API, WORKER, begin, begin_in_engine
from conserve.engine.promises import TARGETS_METHOD, told_targets
from conserve.engine.queue import is_online
from conserve.engine.tracing import say_more_in_spans
from conserve.engine.versions import installed, refusal

logger = logging.getLogger("vllm.conserve")

_PATCHED = "_conserve_patched"


def register() -> None:
    """Wrap what these processes call; harmless when called again, or without our scheduler.

    A vLLM that is not tried with ConServe is left as it is: it may serve without us. Our scheduler
    refuses it, with the same words.
    """
    if why := refusal(installed()):
        logger.warning("ConServe leaves this vLLM alone: %s", why)
        return
    from conserve.engine import door
    from conserve.engine.launch import CONNECTOR, CONNECTOR_MODULE

    write_faults()
    begin_in_engine(WORKER)
    choose_secret()  # before any process that shares a flag is started
    core = door.EngineCore
    if getattr(core, _PATCHED, False):
        return
    setattr(core, _PATCHED, True)
    setattr(core, TARGETS_METHOD, told_targets)
    core.preprocess_add_request = _watched(core.preprocess_add_request)
    _call_when_built(door.engine_core_module)
    say_more_in_spans(door.output_processor_module)
    leave_out_settings(door.VllmConfig)
    # vLLM's MultiConnector finds the statistics of its children by their registered names.
    door.KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)


def _watched(preprocess: Any) -> Any:
    """Tell the monitor of online arrivals; this runs in the input thread, beside the forward."""

    @wraps(preprocess)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        result = preprocess(self, request)
        scheduler, arrived = self.scheduler, result[0]
        monitor = getattr(scheduler, "monitor", None)
        if monitor is not None and is_online(arrived):
            arrived_s = scheduler.arrived_s(arrived)
            own = scheduler.promises.own_targets(arrived)
            monitor.arrived(arrived.request_id, arrived_s, arrived.num_tokens, own.ttft_s)
        return result

    return preprocess_add_request


def _call_when_built(module: Any) -> None:
    """Fit the latency model right after the engine is built, before it takes requests.

    vLLM loads plugins inside `EngineCore.__init__`, so that method itself can no longer be
    wrapped. A method it calls after the scheduler is built tells which engine it is, and the
    function it calls last tells that it is done.
    """
    core = module.EngineCore
    under_construction: list[Any] = []
    scheduler_built = core._initialize_effective_attention_block_size
    last_call = module.enable_envs_cache

    @wraps(scheduler_built)
    def _initialize_effective_attention_block_size(self: Any) -> None:
        scheduler_built(self)
        under_construction.append(self)

    @wraps(last_call)
    def enable_envs_cache() -> None:
        last_call()
        while under_construction:
            _built(under_construction.pop())

    core._initialize_effective_attention_block_size = _initialize_effective_attention_block_size
    module.enable_envs_cache = enable_envs_cache


def _built(engine_core: Any) -> None:
    from conserve.engine.calibrate import calibrate
    from conserve.engine.scheduler import ConserveScheduler

    if isinstance(engine_core.scheduler, ConserveScheduler):
        calibrate(engine_core)
    begin(API)
