"""ASGI middleware that puts files and batches on the app it is named for.

Works in `conserve serve` and, by name, under plain vLLM:
`vllm serve --middleware conserve.server.batches.middleware.BatchesMiddleware`.

Each of vLLM's API processes gets one service, with routes inside vLLM's own checks. The other
door, the entry point group `vllm.endpoint_plugins`, opens only to what VLLM_PLUGINS names, and
naming one plugin there shuts out every plugin of every group that is not named too.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from typing import Any

from fastapi import FastAPI

from conserve.batch.executor import asgi_executor
from conserve.batch.service import BatchService
from conserve.server.batches.engine import EngineExecutor, api_keys, fitting_settings
from conserve.server.batches.metrics import batch_metrics
from conserve.server.batches.routes import batch_service
from conserve.server.lifespan import LifespanMiddleware

logger = logging.getLogger(__name__)

GIVE_BACK_S = 5.0
"""Beyond the drain, how long the engine's end waits for a database that does not answer."""


class BatchesMiddleware(LifespanMiddleware):
    """Brings the batch service."""

    def inside(self, app: FastAPI) -> AbstractAsyncContextManager[None]:
        return _batches(app)


@asynccontextmanager
async def _batches(app: FastAPI) -> AsyncIterator[None]:
    args, engine = app.state.args, app.state.engine_client
    settings = fitting_settings(args, engine.vllm_config)
    keys = api_keys(args)
    in_process = asgi_executor(app, api_key=keys[0] if keys else None)
    executor = EngineExecutor(in_process, engine)
    try:
        async with batch_service(settings, app, executor) as service:

            async def stop() -> None:
                # Without a drain, the engine may have been told to end before we were.
                executor.is_leaving = settings.drain_s == 0
                stopping = asyncio.ensure_future(service.stop())
                await asyncio.wait({stopping}, timeout=settings.drain_s + GIVE_BACK_S)
                executor.is_leaving = True

            with _before_shutdown(engine, stop):
                async with _metrics(service, engine.vllm_config):
                    yield
    finally:
        await in_process.close()


def _metrics(service: BatchService, config: Any) -> AbstractAsyncContextManager[None]:
    """All API processes see one store; the first tells of it."""
    if config.parallel_config._api_process_rank > 0:
        return nullcontext()
    return batch_metrics(service.stores, time.time)


@contextmanager
def _before_shutdown(engine: Any, stop: Callable[[], Coroutine[Any, Any, None]]) -> Iterator[None]:
    """Let `stop` run to its end, in this loop, before the engine is shut down.

    On a signal vLLM shuts its engine down first, from a thread, and ends the app's lifespan last,
    when there is nothing left to drain with. What `stop` takes is taken off the engine's time.
    """
    loop, home = asyncio.get_running_loop(), threading.get_ident()
    shutdown = engine.shutdown

    def stop_first(timeout: float | None = None) -> None:
        began_s = time.monotonic()
        if threading.get_ident() != home:  # at home, the lifespan has ended or will stop it
            try:
                asyncio.run_coroutine_threadsafe(stop(), loop).result()
            except Exception:
                logger.exception("the batch service did not stop; its lines run again")
        if timeout is not None:
            timeout = max(0.0, timeout - (time.monotonic() - began_s))
        shutdown(timeout=timeout)

    engine.shutdown = stop_first
    try:
        yield
    finally:
        del engine.shutdown
