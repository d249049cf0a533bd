"""ASGI app that passes each request on to the replica's server, and its answer back as it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

from conserve.server.asgi import Receive, Scope, Send

# Of one connection, and of the proxy before us: it names its own.
NOT_PASSED_ON = frozenset(
    {b"connection", b"expect", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
THE_PROXYS = frozenset({b"date", b"server", b"x-request-id"})
REPLICA = b"x-conserve-replica"
KEEP_S = 2.0
"""An idle connection is used again for less long than the server keeps it open."""
TIMEOUT = {"connect": 10.0, "read": None, "write": None, "pool": None}
"""Of answers none: an offline request may wait for hours."""
AWAY = {
    "error": {
        "message": "This replica's server has ended. Try again: another is taking over.",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
}


class _DisconnectedError(Exception):
    """Whoever asked is gone."""


class Forward:
    """Passes on what Serve hands to a replica; a client that goes ends its request in the engine.
    Web sockets are refused. `stop` is awaited at the end of the app's life; every answer
    names the replica."""

    def __init__(self, url: str, replica: str, stop: Callable[[], Awaitable[None]]) -> None:
        self._url = httpx.URL(url)
        self._replica = (REPLICA, replica.encode())
        self._stop = stop
        self._transport = httpx.AsyncHTTPTransport(
            trust_env=False,
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_S),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._pass_on(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": "no web sockets here"})

    async def _live(self, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await self._transport.aclose()
        await self._stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(receive, send, self._replica)
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(exchange.until_gone())
                await self._answer(self._request(scope, exchange), exchange)
                watch.cancel()
        except* _DisconnectedError:
            pass

    def _request(self, scope: Scope, exchange: _Exchange) -> httpx.Request:
        path = scope.get("raw_path") or scope["path"].encode()
        path = path.removeprefix((scope.get("root_path") or "").encode()) or b"/"
        query = scope.get("query_string") or b""
        headers = [(name, value) for name, value in scope["headers"] if name not in NOT_PASSED_ON]
        client = scope.get("client")
        if client:
            headers.append((b"x-forwarded-for", str(client[0]).encode()))
        return httpx.Request(
            scope["method"],
            self._url.copy_with(raw_path=path + (b"?" + query if query else b"")),
            headers=headers,
            content=exchange.body(_has_body(scope)),
            extensions={"timeout": TIMEOUT},
        )

    async def _answer(self, request: httpx.Request, exchange: _Exchange) -> None:
        try:
            response = await self._transport.handle_async_request(request)
        except httpx.TransportError:
            await exchange.say_away()
            return
        try:
            await exchange.pass_back(response)
        finally:
            await response.aclose()


class _Exchange:
    """One request of Serve's: what is still to be read of it, and what is written back."""

    def __init__(self, receive: Receive, send: Send, replica: tuple[bytes, bytes]) -> None:
        self._receive, self._send, self._replica = receive, send, replica
        self._is_read = asyncio.Event()

    def body(self, has_body: bool) -> AsyncIterator[bytes] | None:
        """As it arrives, if the request has one."""
        if has_body:
            return self._parts()
        self._is_read.set()
        return None

    async def _parts(self) -> AsyncIterator[bytes]:
        """Raises _DisconnectedError."""
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _DisconnectedError
            more = message.get("more_body", False)
            yield message.get("body", b"")
        self._is_read.set()

    async def until_gone(self) -> None:
        """Raises _DisconnectedError when the client goes after it has sent everything."""
        await self._is_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        raise _DisconnectedError

    async def pass_back(self, response: httpx.Response) -> None:
        left_out = NOT_PASSED_ON | THE_PROXYS
        headers = [pair for pair in response.headers.raw if pair[0].lower() not in left_out]
        await self._start(response.status_code, headers)
        async for chunk in response.stream:  # type: ignore[union-attr]
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    async def say_away(self) -> None:
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        await self._start(503, headers)
        await self._send({"type": "http.response.body", "body": json.dumps(AWAY).encode()})

    async def _start(self, status: int, headers: list[Any]) -> None:
        headers.append(self._replica)
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


def _has_body(scope: Scope) -> bool:
    names = dict(scope["headers"])
    return b"transfer-encoding" in names or names.get(b"content-length", b"0") != b"0"
