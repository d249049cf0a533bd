"""vLLM's general plugin: hooks our scheduler into the engine process. Loaded by every process."""

from __future__ import annotations

from functools import wraps
from typing import Any

from conserve.engine.queue import is_online

_PATCHED = "_conserve_patched"


def register() -> None:
    """Wrap two methods of EngineCore; harmless when called again, or without our scheduler."""
    from conserve.engine.door import EngineCore

    if getattr(EngineCore, _PATCHED, False):
        return
    setattr(EngineCore, _PATCHED, True)
    EngineCore.__init__ = _profiled(EngineCore.__init__)
    EngineCore.preprocess_add_request = _watched(EngineCore.preprocess_add_request)


def _profiled(init: Any) -> Any:
    """Fit the latency model right after the engine is built, before it takes requests."""

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        init(self, *args, **kwargs)
        from conserve.engine.calibrate import calibrate
        from conserve.engine.scheduler import ConserveScheduler

        if isinstance(self.scheduler, ConserveScheduler):
            calibrate(self)

    return __init__


def _watched(preprocess: Any) -> Any:
    """Tell the monitor of online arrivals; this runs in the input thread, beside the forward."""

    @wraps(preprocess)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        result = preprocess(self, request)
        monitor = getattr(self.scheduler, "monitor", None)
        if monitor is not None and is_online(result[0]):
            arrived = result[0]
            monitor.arrived(arrived.request_id, arrived.arrival_time, arrived.num_tokens)
        return result

    return preprocess_add_request
