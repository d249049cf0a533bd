"""ASGI middleware that brings our messages into vLLM's log, and a line a minute of what matters.

Works in `conserve serve` and, by name, under plain vLLM:
`vllm serve --middleware conserve.server.logs_middleware.LogsMiddleware`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI

from conserve.server.batches_middleware import Lifespan
from conserve.server.minute_log import log_each
from conserve.server.tiers import App, Receive, Scope, Send

INTERVAL_S = 60.0


class LogsMiddleware:
    """Passes every request on; its work is done while the app runs."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            router = scope["app"].router
            router.lifespan_context = with_logs(router.lifespan_context)
        await self.app(scope, receive, send)


def with_logs(lifespan: Lifespan) -> Lifespan:
    """The lifespan of vLLM's app, with the minute's line beside it."""

    @asynccontextmanager
    async def both(app: FastAPI) -> AsyncIterator[Any]:
        join_vllms_log()
        async with lifespan(app) as state, _minutes(app):
            yield state

    return both


def join_vllms_log() -> None:
    """Our rooms name their loggers after themselves; vLLM gives a handler to its own only."""
    ours, vllms = logging.getLogger("conserve"), logging.getLogger("vllm")
    if vllms.handlers and not ours.handlers:
        ours.handlers = list(vllms.handlers)
        ours.setLevel(vllms.level)
        ours.propagate = False


@asynccontextmanager
async def _minutes(app: FastAPI) -> AsyncIterator[None]:
    """In the first API process: what it reads is of all of them."""
    from conserve.server import door

    interval_s = getattr(app.state.args, "log_interval_s", INTERVAL_S)
    config = app.state.engine_client.vllm_config
    if not interval_s or config.parallel_config._api_process_rank > 0:
        yield
        return
    task = asyncio.create_task(log_each(interval_s, door.metrics_registry()), name="conserve-log")
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
