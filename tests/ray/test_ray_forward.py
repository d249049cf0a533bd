"""What a replica hands to its server and back: the whole of a request and of its answer, as it
comes, and the end of a request whose client has gone."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from conserve.bench.ports import free_port
from conserve.ray.forward import Forward
from conserve.server.asgi import Message

pytestmark = pytest.mark.anyio

PATIENCE_S = 60.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Upstream:
    """A server of its own that says what it was asked."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.left = asyncio.Event()
        routes = [
            Route("/echo", self._echo, methods=["GET", "POST", "DELETE"]),
            Route("/v1/stream", self._stream, methods=["GET", "POST"]),
            Route("/refused", lambda _: PlainTextResponse("no", 429, {"retry-after": "7"})),
        ]
        self.app = Starlette(routes=routes)

    async def _echo(self, request: Request) -> JSONResponse:
        body = await request.body()
        seen = {
            "method": request.method,
            "path": request.scope["raw_path"].decode(),
            "query": request.url.query,
            "headers": [(key.decode(), value.decode()) for key, value in request.headers.raw],
            "num_bytes": len(body),
        }
        return JSONResponse(seen, headers={"x-answer": "yes", "x-request-id": "ours"})

    async def _stream(self, request: Request) -> StreamingResponse:
        await request.body()
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        try:
            yield "data: one\n\n"
            await self.go_on.wait()
            yield "data: two\n\n"
        finally:
            self.left.set()


@asynccontextmanager
async def serving(app: Starlette) -> AsyncIterator[str]:
    """The address of `app` on a real web server, since it is connections that are looked at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        task = asyncio.create_task(server.serve([listening]))
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        await task


class Client:
    """Speaks to the app as Serve does: `left` makes it disconnect."""

    def __init__(self, body: list[bytes]) -> None:
        self.sent: list[Message] = []
        self.left = asyncio.Event()
        self._body = list(body)
        self._changed = asyncio.Event()

    async def receive(self) -> Message:
        if self._body:
            part = self._body.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._body)}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self._changed.wait()
                self._changed.clear()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    def headers(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.sent[0]["headers"] if key == name]


async def nothing() -> None:
    """How the tests' app ends its server."""


def scope(method: str, path: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    raw, _, query = path.partition("?")
    named = {"host": "chat.example.com", **(headers or {})}
    return {
        "type": "http",
        "method": method,
        "path": raw,
        "raw_path": raw.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(key.encode(), value.encode()) for key, value in named.items()],
        "client": ("10.1.2.3", 4567),
    }


async def asked(url: str, client: Client, asking: dict[str, Any]) -> Client:
    """One request in an app's life."""
    forward = Forward(url, "replica-1", nothing)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await forward(asking, client.receive, client.send)
    finally:
        await live(forward, [])
    return client


async def live(forward: Forward, sent: list[Message]) -> None:
    """From its start to its end, without a request."""
    messages = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Message:
        return {"type": next(messages)}

    async def send(message: Message) -> None:
        sent.append(message)

    await forward({"type": "lifespan"}, receive, send)


async def test_a_request_and_its_answer_are_passed_on_whole() -> None:
    parts = [b"a" * 70_000, b"", b"b" * 70_000]
    headers = {
        "content-length": "140000",
        "authorization": "Bearer key",
        "x-slo-ttft-ms": "300",
        "accept-encoding": "br",
        "connection": "close",
    }
    async with serving(Upstream().app) as url:
        client = await asked(url, Client(parts), scope("POST", "/echo?a=b%20c&d", headers))
    seen = json.loads(client.body)
    del headers["connection"]
    wanted = {**headers, "host": "chat.example.com", "x-forwarded-for": "10.1.2.3"}
    assert dict(seen["headers"]).items() >= wanted.items()
    assert "user-agent" not in dict(seen["headers"])
    assert (seen["method"], seen["path"], seen["query"]) == ("POST", "/echo", "a=b%20c&d")
    assert seen["num_bytes"] == 140_000
    assert client.sent[0]["status"] == 200
    assert client.headers(b"x-answer") == [b"yes"]
    assert client.headers(b"x-conserve-replica") == [b"replica-1"]
    assert client.headers(b"x-request-id") == []  # Serve adds the one it has sent along
    assert client.sent[-1].get("more_body", False) is False


async def test_a_prefix_of_serves_is_no_part_of_the_path() -> None:
    async with serving(Upstream().app) as url:
        asking = {**scope("GET", "/llm/echo"), "root_path": "/llm"}
        client = await asked(url, Client([b""]), asking)
    assert json.loads(client.body)["path"] == "/echo"


async def test_a_refusal_is_passed_back() -> None:
    async with serving(Upstream().app) as url:
        client = await asked(url, Client([b""]), scope("GET", "/refused"))
    assert (client.sent[0]["status"], client.body) == (429, b"no")
    assert client.headers(b"retry-after") == [b"7"]


async def test_events_come_as_they_are_made() -> None:
    upstream = Upstream()
    async with serving(upstream.app) as url:
        client = Client([b"{}"])
        task = asyncio.create_task(asked(url, client, posted()))
        await client.until(lambda: client.body == b"data: one\n\n")
        upstream.go_on.set()
        await task
    assert client.body == b"data: one\n\ndata: two\n\n"


@pytest.mark.parametrize("how", ["disconnect", "cancel"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_client_that_goes_ends_its_request(how: str, method: str) -> None:
    """Serve does both: it says so, and cancels what it has called."""
    upstream = Upstream()
    async with serving(upstream.app) as url:
        client = Client([b"{}" if method == "POST" else b""])
        asking = posted() if method == "POST" else scope("GET", "/v1/stream")
        task = asyncio.create_task(asked(url, client, asking))
        await client.until(lambda: client.body == b"data: one\n\n")
        if how == "cancel":
            task.cancel()
        else:
            client.left.set()
        await asyncio.wait({task})
        assert task.cancelled() == (how == "cancel")
        async with asyncio.timeout(PATIENCE_S):
            await upstream.left.wait()


async def test_a_client_that_goes_in_the_middle_of_its_upload_ends_it() -> None:
    upstream = Upstream()
    async with serving(upstream.app) as url:
        client = Client([])
        client.left.set()
        await asked(url, client, posted())
    assert client.sent == []


async def test_a_replica_whose_server_is_gone_says_so() -> None:
    client = await asked(f"http://127.0.0.1:{free_port()}", Client([b"{}"]), posted())
    assert client.sent[0]["status"] == 503
    assert client.headers(b"retry-after") == [b"1"]
    assert json.loads(client.body)["error"]["type"] == "ServiceUnavailableError"


async def test_web_sockets_are_refused() -> None:
    client = Client([b""])
    await asked("http://127.0.0.1:9", client, {"type": "websocket"})
    assert [message["type"] for message in client.sent] == ["websocket.close"]


async def test_the_server_ends_with_the_apps_life() -> None:
    sent: list[Message] = []

    async def stop() -> None:
        sent.append({"type": "the server has ended"})

    await live(Forward("http://127.0.0.1:9", "replica-1", stop), sent)
    assert [message["type"] for message in sent] == [
        "lifespan.startup.complete",
        "the server has ended",
        "lifespan.shutdown.complete",
    ]


def posted() -> dict[str, Any]:
    return scope("POST", "/v1/stream", {"content-length": "2"})
