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
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

from fastapi import FastAPI

from conserve.batch.executor import asgi_executor
from conserve.batch.service import BatchService
from conserve.server.batches.engine import EngineExecutor, fitting_settings
from conserve.server.batches.metrics import batch_metrics
from conserve.server.batches.pauses import before_pauses
from conserve.server.batches.routes import batch_service
from conserve.server.keys import api_keys
from conserve.server.lifespan import LifespanMiddleware
from conserve.server.shutdown import before_shutdown

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
    in_process = asgi_executor(
        app, api_key=keys[0] if keys else None, headers=settings.request_headers
    )
    executor = EngineExecutor(in_process, engine)
    try:
        async with batch_service(settings, app, executor) as service:

            async def stop() -> None:
                # Without a drain, the engine may have been told to end before we were.
                executor.is_leaving = settings.drain_s == 0
                stopping = asyncio.ensure_future(service.stop())
                await asyncio.wait({stopping}, timeout=settings.drain_s + GIVE_BACK_S)
                executor.is_leaving = True

            with (
                before_pauses(engine, executor.pauses),
                before_shutdown(engine, _in_its_loop(stop)),
            ):
                async with _metrics(service, engine.vllm_config):
                    yield
    finally:
        await in_process.close()


def _metrics(service: BatchService, config: Any) -> AbstractAsyncContextManager[None]:
    """All API processes see one store; the first tells of it."""
    if config.parallel_config._api_process_rank > 0:
        return nullcontext()
    return batch_metrics(service.stores, time.time, service.models)


def _in_its_loop(
    stop: Callable[[], Coroutine[Any, Any, None]],
) -> Callable[[float | None], float | None]:
    """`stop`, to be called and waited for in the thread that ends the engine, at whose cost in
    time it is. In the loop's own thread nothing is done: there the lifespan has ended, or will
    stop it."""
    loop, home = asyncio.get_running_loop(), threading.get_ident()

    def stop_and_wait(timeout_s: float | None) -> float | None:
        began_s = time.monotonic()
        if threading.get_ident() != home:
            try:
                asyncio.run_coroutine_threadsafe(stop(), loop).result()
            except Exception:
                logger.exception("the batch service did not stop; its lines run again")
        return None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - began_s))

    return stop_and_wait
