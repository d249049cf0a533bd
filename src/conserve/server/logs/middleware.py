"""ASGI middleware that brings our messages into vLLM's log, and a line a minute of what matters.

Works in `conserve serve` and, by name, under plain vLLM:
`vllm serve --middleware conserve.server.logs.middleware.LogsMiddleware`.
"""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager, nullcontext

from fastapi import FastAPI

from conserve.engine import phases
from conserve.server.asgi import Receive, Scope, Send
from conserve.server.lifespan import LifespanMiddleware, running
from conserve.server.logs.minute import log_each

INTERVAL_S = 60.0


class LogsMiddleware(LifespanMiddleware):
    """Joins the logs when the app starts, tells that it has, and brings the minute's line."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            join_vllms_log()
        await super().__call__(scope, receive, send)

    def inside(self, app: FastAPI) -> AbstractAsyncContextManager[None]:
        phases.begin(phases.READY)
        return _minutes(app)


def join_vllms_log() -> None:
    """Our rooms name their loggers after themselves; vLLM gives a handler to its own only."""
    ours, vllms = logging.getLogger("conserve"), logging.getLogger("vllm")
    if vllms.handlers and not ours.handlers:
        ours.handlers = list(vllms.handlers)
        ours.setLevel(vllms.level)
        ours.propagate = False


def _minutes(app: FastAPI) -> AbstractAsyncContextManager[None]:
    """In the first API process: what it reads is of all of them. Nothing where vLLM collects no
    figures: all would be 0."""
    from conserve.server import door

    args, config = app.state.args, app.state.engine_client.vllm_config
    interval_s = getattr(args, "log_interval_s", INTERVAL_S)
    if not interval_s or args.disable_log_stats or config.parallel_config._api_process_rank > 0:
        return nullcontext()
    return running(log_each(interval_s, door.metrics_registry()), "conserve-log")
