"""ASGI middleware that counts what each key's online and flex requests come to.

Works in `conserve serve` and, by name and before the batches', whose database it uses, under plain
vLLM: `vllm serve --middleware conserve.server.usage.middleware.UsageMiddleware
--middleware conserve.server.batches.middleware.BatchesMiddleware`.

Lines of batches pass through: the store counts them with their results.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext

from fastapi import FastAPI

from conserve.batch.ids import EVERYBODY, tenant_of
from conserve.engine.batch_line import current_line
from conserve.server.asgi import App, Message, Receive, Scope, Send, header
from conserve.server.asked import tell_of_requests
from conserve.server.batches.routes import service_of
from conserve.server.lifespan import LifespanMiddleware
from conserve.server.usage.bill import Bill
from conserve.server.usage.meter import measure, tell_meter

_ERROR_EVENTS = (b'data: {"error"', b"event: error\n")
"""In place of the rest of a stream, whose status is 200; vLLM sends each event as one message."""
_ABORTED = b'"finish_reason":"abort"'
"""By whoever paused the engine or sent it to sleep. No quote in an answer's text looks like that:
it is escaped."""


class UsageMiddleware(LifespanMiddleware):
    """Measures requests once the batch service is there, whose database keeps the counts."""

    def __init__(self, app: App) -> None:
        super().__init__(app)
        self._bill: Bill | None = None

    def inside(self, app: FastAPI) -> AbstractAsyncContextManager[None]:
        service = service_of(app)
        if service is None:
            return nullcontext()
        names = app.state.args.served_model_name or [app.state.args.model]
        self._bill = Bill(service.stores, str(names[0]), by_key=service.settings.tenant_by_key)
        tell_of_requests(app.state.engine_client, tell_meter)
        return self._bill.kept()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._bill is None or scope["type"] != "http" or scope["method"] != "POST":
            await super().__call__(scope, receive, send)
            return
        if current_line() is not None:
            measure(None)
            await self.app(scope, receive, send)
            return
        meter = self._bill.open(_owner(scope, by_key=self._bill.by_key))
        exchange = _Exchange(receive, send)
        measure(meter)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            measure(None)
            self._bill.end(meter, is_complete=exchange.is_complete)


class _Exchange:
    """Whether a client got its answer."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._status = 0
        self._is_sent = False
        self._has_left = False
        self._is_cut_short = False

    @property
    def is_complete(self) -> bool:
        is_whole = self._is_sent and not self._has_left and not self._is_cut_short
        return self._status == 200 and is_whole

    async def receive(self) -> Message:
        message = await self._receive()
        # A web server says so after a complete answer, too.
        if message["type"] == "http.disconnect" and not self._is_sent:
            self._has_left = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        await self._send(message)
        if message["type"] == "http.response.body":
            body = bytes(message.get("body", b""))
            self._is_cut_short |= body.startswith(_ERROR_EVENTS) or _ABORTED in body
            self._is_sent = not message.get("more_body", False)


def _owner(scope: Scope, *, by_key: bool) -> str:
    return tenant_of(header(scope, b"authorization")) if by_key else EVERYBODY
