"""Where a line's request is run: any OpenAI-compatible app, in this process or behind a URL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import httpx
import msgspec

from conserve.batch.hangup import AsgiApp, hanging_up
from conserve.batch.rules import ModelLimits
from conserve.batch.wire import ENDPOINTS


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it came; `body` is not yet known to be JSON."""

    status_code: int
    body: bytes
    request_id: str | None = None
    engine_died: bool = False
    """Whether the engine ended under the request; nobody knows on whose account."""


class Executor(Protocol):
    """Runs requests for the dispatcher. Cancelling `run` stops the request."""

    async def run(self, url: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        """Answer of POST `url`. Any exception means: not the request's fault, try again."""
        ...

    async def models(self) -> Mapping[str, ModelLimits] | None:
        """Models served; None when the app does not tell. May raise as `run` does, and
        UnknownModelsError."""
        ...

    def serves(self, endpoint: str) -> bool:
        """False when the app certainly has no such route."""
        ...

    def room(self) -> int | None:
        """How many more offline requests the engine wants now; None leaves it to the window."""
        ...


class UnknownModelsError(Exception):
    """The app does not list its models; the message says how it answers."""


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


class HttpExecutor:
    """Executor over an httpx client.

    Takes ownership of the client: `close` closes it.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        *,
        api_key: str | None = None,
        endpoints: frozenset[str] | None = None,
        room: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._client = client
        self._endpoints = endpoints
        self._auth = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._room = room

    async def run(self, url: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        sent = {"content-type": "application/json", **headers, **self._auth}
        try:
            response = await self._client.post(url, content=body, headers=sent)
        except httpx.ConnectError:  # nobody is there yet: no fault of the request
            return Reply(503, b"")
        request_id = response.headers.get("x-request-id")
        return Reply(response.status_code, response.content, request_id)

    async def models(self) -> Mapping[str, ModelLimits] | None:
        response = await self._client.get("/v1/models", headers=self._auth)
        if response.status_code == 404:
            return None
        if response.is_error:
            raise UnknownModelsError(f"GET /v1/models answers {response.status_code}")
        cards = msgspec.json.decode(response.content, type=_Cards).data
        return {card.id: ModelLimits(card.max_model_len) for card in cards}

    def serves(self, endpoint: str) -> bool:
        return self._endpoints is None or endpoint in self._endpoints

    def room(self) -> int | None:
        return self._room()

    async def close(self) -> None:
        await self._client.aclose()


def asgi_executor(
    app: AsgiApp,
    *,
    api_key: str | None = None,
    headers: Mapping[str, str] | None = None,
    room: Callable[[], int | None] = lambda: None,
) -> HttpExecutor:
    """Executor over an app in this process: no socket, no copy, and to the app a cancelled line is
    a client that hangs up. `api_key` is one the app itself accepts; every request carries
    `headers`."""
    transport = httpx.ASGITransport(app=hanging_up(app), raise_app_exceptions=False)
    client = httpx.AsyncClient(
        transport=transport,
        base_url="http://in-process",
        timeout=httpx.Timeout(None),
        headers=headers,
    )
    paths = {getattr(route, "path", None) for route in getattr(app, "routes", ())}
    endpoints = frozenset(path for path in ENDPOINTS if path in paths) if paths else None
    return HttpExecutor(client, api_key=api_key, endpoints=endpoints, room=room)
