"""One request and its response on their way through the middleware."""

from __future__ import annotations

import json
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from conserve.server.asgi import Message, Receive, Scope, Send, header, path_of
from conserve.server.tiers.bodies import json_object
from conserve.server.tiers.classes import RefusedError, RequestClass
from conserve.server.tiers.inherited import remember
from conserve.server.tiers.load import Uncounted
from conserve.server.tiers.naming import named_event, named_json
from conserve.server.tiers.paths import ECHOING, VECTOR_PATHS
from conserve.server.tiers.rules import Rules
from conserve.server.tiers.targets import HEADERS, move_targets
from conserve.server.tiers.waiting import WAIT_HEADER, FlexWait, forget_wait

PRIORITY_HEADER = b"x-vllm-priority"
_WORDS = (b"service_tier", b"priority", b"slo-t")
_ONLINE = RequestClass("default", 0)


def _headers(error: RefusedError) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in error.headers.items()]


class Exchange:
    """Classifies the request as the application reads it, and names its tier in the response."""

    def __init__(
        self, receive: Receive, send: Send, scope: Scope, rules: Rules, uncounted: Uncounted
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._rules = rules
        self._uncounted = uncounted
        self._wait: FlexWait | None = None
        self._wait_header = header(scope, WAIT_HEADER)
        self._send = send
        self._path = path_of(scope)
        self._priority_header = header(scope, PRIORITY_HEADER)
        self._targets = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in HEADERS
        }
        self._body: list[bytes] = []
        self._body_done = False
        self._class: RequestClass | None = None
        self._rejected: RefusedError | None = None
        self._start: Message | None = None  # held back while a JSON body is collected
        self._reply: list[bytes] = []
        self._stream = False

    @property
    def is_given_up(self) -> bool:
        return self._wait is not None and self._wait.error is not None

    def end(self) -> None:
        if self._wait is not None:
            self._rules.queue.leave(self._wait)

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
        if self._wait is not None:
            return await self._wait.receive(self._receive)
        return await self._receive()

    def _classified(self) -> bytes:
        """The request body with its class written in; any that is no JSON object as it came."""
        raw = b"".join(self._body)
        self._body.clear()
        remember(_ONLINE.priority)
        forget_wait()
        if self._says_nothing(raw):
            self._class = _ONLINE
            return raw
        if (body := json_object(raw)) is None:
            return raw
        try:
            found = self._rules.classify(body, self._priority_header)
            move_targets(body, self._targets)
            if found is not None and not found.online:
                self._wait = self._rules.waits_for(self._wait_header)
        except RefusedError as error:
            self._rejected = error
            # FastAPI passes this one on while it reads the body; `send` words the answer.
            raise HTTPException(error.status, str(error), dict(error.headers)) from error
        if found is None:
            return raw
        self._class = found
        remember(found.priority)
        if not found.online:
            self._uncounted.take_out()
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
            event = self._named(named_event, message.get("body", b""))
            await self._deliver({**message, "body": event})
        else:
            await self._deliver(message)

    def _named(self, name: Callable[..., bytes], text: bytes) -> bytes:
        assert self._class is not None
        return name(text, self._class, self._path)

    async def _deliver(self, message: Message) -> None:
        if self._wait is None:
            await self._send(message)
        else:
            await self._wait.deliver(message, self._send)

    async def refuse_late(self) -> None:
        """Once the application is done: answer a request that has waited too long."""
        if self._wait is not None and (error := self._wait.error):
            answer = JSONResponse(error.envelope(), error.status, error.headers)
            await answer(self._scope, self._receive, self._send)

    async def _send_start(self, message: Message) -> None:
        kind = header(message, b"content-type") or ""
        named = self._class is not None and message["status"] == 200
        named &= self._path not in VECTOR_PATHS
        if kind.startswith("application/json") and (named or self._rejected):
            self._start = message
            return
        self._stream = named and kind.startswith("text/event-stream")
        await self._deliver(message)

    async def _send_json(self, message: Message) -> None:
        self._reply.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        start, self._start = self._start, None
        assert start is not None
        said = []
        if self._rejected:
            body = json.dumps(self._rejected.envelope()).encode()
            said = _headers(self._rejected)  # vLLM leaves them out
        else:
            body = self._named(named_json, b"".join(self._reply))
        ours = {b"content-length", *(name for name, _ in said)}
        headers = [(k, v) for k, v in start["headers"] if k not in ours]
        headers += [*said, (b"content-length", str(len(body)).encode())]
        await self._deliver({**start, "headers": headers})
        await self._deliver({**message, "body": body})
