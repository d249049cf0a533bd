"""An app in this process whose cancelled request is a client that hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

UNWIND_S = 5.0
"""How long an app may take to notice that nobody listens any more, before it is cancelled."""


def hanging_up(app: AsgiApp) -> AsgiApp:
    """The same app. A cancellation alone does not reach work that the app does in tasks of its own,
    as vLLM's routes do: the request would run on in the engine, for nobody."""

    async def call(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        gone = asyncio.Event()
        running = asyncio.ensure_future(app(scope, _until(gone, receive), send))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            gone.set()
            try:
                await asyncio.wait({running}, timeout=UNWIND_S)
            finally:
                running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            raise

    return call


def _until(gone: asyncio.Event, receive: Receive) -> Receive:
    """`receive` as long as the client is there; `http.disconnect` from then on."""

    async def receive_or_disconnect() -> Message:
        reading = asyncio.ensure_future(receive())
        leaving = asyncio.ensure_future(gone.wait())
        try:
            await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else {"type": "http.disconnect"}
        finally:
            reading.cancel()
            leaving.cancel()

    return receive_or_disconnect
