"""One replica of a measured fleet: our batch service and routes over an engine of known speed.

Run as: python -m benchmarks.fleet.replica PORT_FILE SLOTS LINE_S, with the settings of the batch
service in the environment. The engine answers SLOTS chats at a time, each after LINE_S seconds; 0
answers at once. GET /measured tells what the process has spent since it was asked last.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine, Sized
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy import event

from conserve.batch.executor import asgi_executor
from conserve.batch.service import BatchService
from conserve.batch.settings import BatchSettings
from conserve.server.batches.routes import batch_service

Asked = ParamSpec("Asked")
Lines = TypeVar("Lines", bound=Sized)

MODEL = "stand-in"
ANSWER = json.dumps(
    {
        "id": "chatcmpl-stand-in",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "word " * 100},
            }
        ],
        "usage": {"prompt_tokens": 600, "completion_tokens": 100, "total_tokens": 700},
    }
).encode()


class Measured:
    """What one process does to the database, and what that takes."""

    def __init__(self, service: BatchService) -> None:
        self._engine = service.stores.database._engine.sync_engine
        leases = service.stores.leases
        event.listen(self._engine, "before_cursor_execute", self._count_statement)
        event.listen(self._engine, "begin", self._count_transaction)
        self._reset()
        leases.claim = self._timed("claims", leases.claim)  # type: ignore[method-assign]
        leases.record = self._timed("records", leases.record)  # type: ignore[method-assign]

    def _reset(self) -> None:
        self._since = time.monotonic(), time.process_time()
        self._counts = {"statements": 0, "transactions": 0}
        self._calls: dict[str, list[tuple[float, int]]] = {"claims": [], "records": []}

    def _count_statement(self, *_: Any) -> None:
        self._counts["statements"] += 1

    def _count_transaction(self, _connection: Any) -> None:
        self._counts["transactions"] += 1

    def _timed(
        self, name: str, call: Callable[Asked, Coroutine[Any, Any, Lines]]
    ) -> Callable[Asked, Coroutine[Any, Any, Lines]]:
        async def timed(*arguments: Asked.args, **options: Asked.kwargs) -> Lines:
            start = time.monotonic()
            result = await call(*arguments, **options)
            self._calls[name].append((time.monotonic() - start, len(result)))
            return result

        return timed

    def take(self) -> dict[str, Any]:
        """Since the last `take`: `claims` and `records` are pairs of seconds and lines."""
        wall_s, cpu_s = (time.monotonic() - self._since[0], time.process_time() - self._since[1])
        taken = {"wall_s": wall_s, "cpu_s": cpu_s, **self._counts, **self._calls}
        self._reset()
        return taken


def engine_app(slots: int, line_s: float) -> FastAPI:
    app, free = FastAPI(), asyncio.Semaphore(slots)

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "max_model_len": 8192}]})

    async def chat(request: Request) -> Response:
        await request.body()
        if line_s:
            async with free:
                await asyncio.sleep(line_s)
        return Response(ANSWER, media_type="application/json")

    app.add_route("/v1/models", models)
    app.add_route("/v1/chat/completions", chat, methods=["POST"])
    return app


async def main(port_file: Path, slots: int, line_s: float) -> None:
    app = engine_app(slots, line_s)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    async with batch_service(BatchSettings(), app, asgi_executor(app)) as service:
        measured = Measured(service)

        async def tell(_request: Request) -> Response:
            return JSONResponse(measured.take())

        app.add_route("/measured", tell)
        loop, stop = asyncio.get_running_loop(), partial(setattr, server, "should_exit", True)
        loop.add_signal_handler(15, stop)
        serving = asyncio.create_task(server._serve())
        while not server.started:  # noqa: ASYNC110  (uvicorn has no event for it)
            await asyncio.sleep(0.01)
        port_file.with_suffix(".new").write_text(str(server.servers[0].sockets[0].getsockname()[1]))
        port_file.with_suffix(".new").replace(port_file)
        await serving


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
