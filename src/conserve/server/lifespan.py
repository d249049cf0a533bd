"""Where a middleware's work is done inside the life of the app it is named for.

vLLM hands `--middleware` to each of its API processes, and the lifespan of an app passes through
its middleware: so each process gets what a middleware brings once, when the app is ready.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI

from conserve.server.asgi import App, Receive, Scope, Send

logger = logging.getLogger(__name__)

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]


class LifespanMiddleware:
    """Passes every request on; its work is `inside`."""

    def __init__(self, app: App) -> None:
        self.app = app

    def inside(self, app: FastAPI) -> AbstractAsyncContextManager[None]:
        """Entered once `app` has started, with all that earlier ones have put on it; left before
        it ends."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            router = scope["app"].router
            router.lifespan_context = self._around(router.lifespan_context)
        await self.app(scope, receive, send)

    def _around(self, lifespan: Lifespan) -> Lifespan:
        @asynccontextmanager
        async def both(app: FastAPI) -> AsyncIterator[Any]:
            async with lifespan(app) as state, self.inside(app):
                yield state

        return both


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """`work` as a task of that name; cancelled, and waited for, on the way out. What it dies of is
    logged when it does: whoever leaves has things of its own to bring to an end."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_say_why)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def _say_why(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.error("%s has ended", task.get_name(), exc_info=error)
