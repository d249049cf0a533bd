"""ASGI middleware that turns `service_tier` into vLLM's `priority`, and says it in the response;
a request's own targets go along.

Works in `conserve serve` and, by name, under plain vLLM:
`vllm serve --middleware conserve.server.tiers.ServiceTierMiddleware`.

The request body is rewritten as the application reads it, so authentication comes first and a
client that sends none is none of our business. A stream is passed on event by event: a chunk
costs one prefix test and one concatenation.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.exceptions import HTTPException

from conserve.server.asgi import App, Message, Receive, Scope, Send
from conserve.server.tiers.classes import BadFieldError, RequestClass, classify
from conserve.server.tiers.inherited import inherit, remember
from conserve.server.tiers.paths import ECHOING, PATHS, VECTOR_PATHS
from conserve.server.tiers.targets import HEADERS, move_targets
from conserve.server.tiers.usage import complete

PRIORITY_HEADER = b"x-vllm-priority"

_WORDS = (b"service_tier", b"priority", b"slo-t")
_ONLINE = RequestClass("default", 0)
_EVENT = b"data: {"
_ERROR_EVENT = b'data: {"error"'


class ServiceTierMiddleware:
    """Classifies requests of the OpenAI endpoints; everything else passes untouched."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ours = PATHS | VECTOR_PATHS
        if scope["type"] != "http" or scope["method"] != "POST" or _path(scope) not in ours:
            await self.app(scope, receive, send)
            return
        if engine_client := _engine_client(scope):
            inherit(engine_client)
        exchange = _Exchange(receive, send, scope)
        # The header is folded into the body: vLLM would let it overrule what we write there.
        headers = [(name, value) for name, value in scope["headers"] if name != PRIORITY_HEADER]
        await self.app({**scope, "headers": headers}, exchange.receive, exchange.send)


def _engine_client(scope: Scope) -> Any:
    """What vLLM's app asks; None where it asks nobody."""
    app = scope.get("app")
    return getattr(app.state, "engine_client", None) if app else None


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path") or "")


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


class _Exchange:
    """One request and its response."""

    def __init__(self, receive: Receive, send: Send, scope: Scope) -> None:
        self._receive = receive
        self._send = send
        self._path = _path(scope)
        self._priority_header = _header(scope, PRIORITY_HEADER)
        self._targets = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in HEADERS
        }
        self._body: list[bytes] = []
        self._body_done = False
        self._class: RequestClass | None = None
        self._rejected: BadFieldError | None = None
        self._start: Message | None = None  # held back while a JSON body is collected
        self._reply: list[bytes] = []
        self._stream = False

    async def receive(self) -> Message:
        """The next message for the application; the body comes whole, classified."""
        while not self._body_done:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._body.append(message.get("body", b""))
            self._body_done = not message.get("more_body", False)
            if self._body_done:
                return {"type": "http.request", "body": self._classified(), "more_body": False}
        return await self._receive()

    def _classified(self) -> bytes:
        """The request body with its class written in; any that is no JSON object as it came."""
        raw = b"".join(self._body)
        self._body.clear()
        remember(_ONLINE.priority)
        if self._says_nothing(raw):
            self._class = _ONLINE
            return raw
        try:
            body = json.loads(raw)
        except ValueError:
            return raw
        if not isinstance(body, dict):
            return raw
        try:
            found = classify(body, self._priority_header)
            move_targets(body, self._targets)
        except BadFieldError as error:
            self._rejected = error
            # FastAPI passes this one on while it reads the body; `send` words the answer.
            raise HTTPException(status_code=400, detail=str(error)) from error
        if found is None:
            return raw
        self._class = found
        remember(found.priority)
        body["priority"] = found.priority
        if self._path in VECTOR_PATHS:
            body.pop("service_tier", None)
        else:
            body["service_tier"] = found.tier
        return json.dumps(body, separators=(",", ":")).encode()

    def _says_nothing(self, raw: bytes) -> bool:
        """Whether the body need not be read: the usual chat request, with no word of ours."""
        if self._priority_header is not None or self._targets or self._path == ECHOING:
            return False
        return not any(word in raw for word in _WORDS)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._send_start(message)
        elif self._start is not None and message["type"] == "http.response.body":
            await self._send_json(message)
        elif self._stream and message["type"] == "http.response.body":
            await self._send({**message, "body": self._named_in_event(message.get("body", b""))})
        else:
            await self._send(message)

    async def _send_start(self, message: Message) -> None:
        kind = _header(message, b"content-type") or ""
        named = self._class is not None and message["status"] == 200
        named &= self._path not in VECTOR_PATHS
        if kind.startswith("application/json") and (named or self._rejected):
            self._start = message
            return
        self._stream = named and kind.startswith("text/event-stream")
        await self._send(message)

    async def _send_json(self, message: Message) -> None:
        self._reply.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        start, self._start = self._start, None
        assert start is not None
        body = self._refusal() if self._rejected else self._named_in_json(b"".join(self._reply))
        headers = [(k, v) for k, v in start["headers"] if k != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**start, "headers": headers})
        await self._send({**message, "body": body})

    def _refusal(self) -> bytes:
        assert self._rejected is not None
        error = {"message": str(self._rejected), "type": "BadRequestError"}
        return json.dumps({"error": {**error, "param": self._rejected.param, "code": 400}}).encode()

    def _named_in_json(self, raw: bytes) -> bytes:
        """A response object with `service_tier`, and all that a flex one's usage is to hold."""
        assert self._class is not None
        try:
            body = json.loads(raw)
        except ValueError:
            return raw
        if not isinstance(body, dict):
            return raw
        body["service_tier"] = self._class.tier
        if self._path != ECHOING and not self._class.online:
            complete(body.get("usage"))
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()

    def _named_in_event(self, event: bytes) -> bytes:
        """A chunk with `service_tier`; vLLM sends each event as one message.

        Inside a JSON string a quote is escaped, so the quoted words can only be keys.
        """
        assert self._class is not None
        if not event.startswith(_EVENT) or event.startswith(_ERROR_EVENT):
            return event
        if b'"service_tier"' in event or (b'"usage":{' in event and not self._class.online):
            data, end, rest = event.removeprefix(b"data: ").partition(b"\n\n")
            return b"data: " + self._named_in_json(data) + end + rest
        return b'data: {"service_tier":"%s",%s' % (
            self._class.tier.encode(),
            event[len(_EVENT) :],
        )
