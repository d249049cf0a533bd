"""ASGI middleware that ends a server in order: from the signal on nothing new is begun.

Works in `conserve serve` and, by name, under plain vLLM:
`vllm serve --middleware conserve.server.draining.DrainingMiddleware`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse

from conserve.server.asgi import App, Receive, Scope, Send, path_of
from conserve.server.door import engine_gone
from conserve.server.lifespan import LifespanMiddleware
from conserve.server.shutdown import after_shutdown, before_shutdown

ANTHROPIC = "/v1/messages"
"""Has an envelope of its own."""
HEALTH = frozenset({"/health", "/ping"})
DRAIN_SHARE = 0.8
"""Of `--shutdown-timeout`, for the requests of a process that owns no engine; the rest is left to
the engines, which are told when all such processes have ended."""
LOOK_S = 0.05
GONE = "The server has shut down before the answer was complete."
REFUSAL = {
    "message": "The server is shutting down and takes no new requests. Ask another, or try again.",
    "type": "ServiceUnavailableError",
    "param": None,
    "code": 503,
}
RETRY_AFTER_S = 5

engine_died = threading.Event()
"""Set where this process ends because its engine ended by itself: vLLM leaves with status 0."""


class DrainingMiddleware(LifespanMiddleware):
    """Passes every request on until the engine is about to be shut down; then /health says 503,
    and what would begin work is refused as vLLM refuses it. What has begun goes on."""

    def __init__(self, app: App) -> None:
        super().__init__(app)
        self._state = _Draining()

    def inside(self, app: FastAPI) -> AbstractAsyncContextManager[None]:
        return _noticing(app.state.engine_client, self._state)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._state.has_begun and _is_new_work(scope):
            await _refusal(scope["path"])(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class _Draining:
    def __init__(self) -> None:
        self.has_begun = False

    def begin(self, timeout_s: float | None) -> float | None:
        self.has_begun = True
        return timeout_s


@asynccontextmanager
async def _noticing(engine: Any, draining: _Draining) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()

    def end_what_is_left() -> None:
        # The loop may be closed where vLLM shuts its engine down once more at the very end.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(end_requests, engine)

    with (
        after_shutdown(engine, end_what_is_left),
        before_shutdown(engine, draining.begin),
        _waiting_for_requests(engine),
    ):
        yield
    if engine.errored and not draining.has_begun:
        engine_died.set()


@contextmanager
def _waiting_for_requests(engine: Any) -> Iterator[None]:
    core = getattr(engine, "engine_core", None)
    if core is None or owns_its_engine(core):
        yield
        return
    with before_shutdown(core, lambda timeout_s: wait_for_requests(engine, timeout_s)):
        yield


def end_requests(engine: Any) -> None:
    """End what has outlasted the engine with an error: nothing will answer it any more, and the
    web server waits for its connections before it ends."""
    engine.output_processor.propagate_error(engine_gone(GONE))


def owns_its_engine(core: Any) -> bool:
    """Whether vLLM's client has started the engine's process. Its shutdown then waits for it to
    drain; another's cuts the connection at once, with streams still coming through it."""
    return getattr(core.resources, "engine_manager", None) is not None


def wait_for_requests(engine: Any, timeout_s: float | None) -> float | None:
    """Wait, in the thread that ends the client, for what this process has begun. Returns what is
    left of the time."""
    if timeout_s is None:
        return None
    began_s = time.monotonic()
    give_up_s = began_s + DRAIN_SHARE * timeout_s
    while engine.get_num_unfinished_requests() and time.monotonic() < give_up_s:
        time.sleep(LOOK_S)
    return max(0.0, timeout_s - (time.monotonic() - began_s))


def _is_new_work(scope: Scope) -> bool:
    return scope["method"] == "POST" or path_of(scope) in HEALTH


def _refusal(path: str) -> JSONResponse:
    envelope: dict[str, Any] = {"error": REFUSAL}
    if path.endswith(ANTHROPIC):
        envelope = {"type": "error", "error": {**REFUSAL, "type": "overloaded_error"}}
    return JSONResponse(envelope, 503, {"retry-after": str(RETRY_AFTER_S)})
