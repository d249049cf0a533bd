"""How long offline requests of clients may wait for their first token, and how many may.

OpenAI answers flex requests that it has no room for with status 429 and the code
`resource_unavailable`: the client asks again later, or at another tier. So does this, once a
request has waited too long, or when too many wait already. Lines of batches wait for ever.
"""

from __future__ import annotations

import asyncio
import math
from contextvars import ContextVar
from typing import Any

from prometheus_client import Counter

from conserve.engine.settings import EngineSettings
from conserve.server.asgi import Message, Receive, Send
from conserve.server.asked import tell_of_requests
from conserve.server.tiers.classes import BadFieldError, RefusedError

WAIT_HEADER = b"x-flex-wait-s"
LEAST_RETRY_S, MOST_RETRY_S = 1, 60
"""OpenAI's clients heed a `Retry-After` of up to a minute."""
RETRY_S = 10
"""For who waits as long as it must."""

REFUSED = Counter(
    "conserve:flex_refused", "Flex requests answered with status 429, by why.", ["reason"]
)
for _reason in ("waited", "full"):
    REFUSED.labels(_reason)  # a rate needs a first value

_current: ContextVar[FlexWait | None] = ContextVar("conserve_flex_wait", default=None)


class FlexUnavailableError(RefusedError):
    """There is no room for a flex request; `wait_s` is how long the next try is to wait."""

    status = 429
    code = "resource_unavailable"

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(f"{message} Try again later, or leave service_tier out.")
        wait_s = RETRY_S if wait_s == math.inf else min(wait_s, MOST_RETRY_S)
        retry_after_s = max(LEAST_RETRY_S, math.ceil(wait_s))
        self.headers = {"retry-after": str(retry_after_s)}

    def envelope(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self.code, "param": None, "code": self.code}
        return {"error": error}


class FlexWait:
    """One request's wait for the first token of anything that it asks of the engine."""

    def __init__(self, wait_s: float) -> None:
        """`wait_s`: inf waits for ever. To be made in the running loop."""
        self.wait_s = wait_s
        self.given_up: asyncio.Future[FlexUnavailableError] = (
            asyncio.get_running_loop().create_future()
        )
        self._held: list[Message] = []
        """Of its response, what was made before that."""
        self._asked: list[Any] = []
        """vLLM's states of its requests: prefilling until their first output."""
        self._has_begun = False
        self._timer: asyncio.TimerHandle | None = None
        if wait_s < math.inf:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._give_up)

    def asks(self, state: Any) -> None:
        self._asked.append(state)

    @property
    def has_begun(self) -> bool:
        self._has_begun = self._has_begun or any(not one.is_prefilling for one in self._asked)
        return self._has_begun

    def _give_up(self) -> None:
        if not self.has_begun and not self.given_up.done():
            REFUSED.labels("waited").inc()
            message = f"No room for this flex request within {self.wait_s:g} s."
            self.given_up.set_result(FlexUnavailableError(message, self.wait_s))

    @property
    def error(self) -> FlexUnavailableError | None:
        """Why it was given up, if it was."""
        return self.given_up.result() if self.given_up.done() else None

    async def deliver(self, message: Message, send: Send) -> None:
        """Send it on, but nothing before the first token, so that no response breaks off: an event
        stream begins before anything is computed. What comes after the giving up goes nowhere."""
        if self.given_up.done():
            return
        if self.wait_s == math.inf:
            await send(message)
            return
        self._held.append(message)
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if self.has_begun or is_last:
            self._has_begun = True
            held, self._held = self._held, []
            for one in held:
                await send(one)

    def end(self) -> None:
        """Its response is complete, or its client has gone."""
        if self._timer is not None:
            self._timer.cancel()

    async def receive(self, receive: Receive) -> Message:
        """The next message for the application: to it, a request that is given up is one whose
        client has hung up, which ends all that vLLM does for it."""
        message = asyncio.ensure_future(receive())
        both: set[asyncio.Future[Any]] = {message, self.given_up}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if self.given_up.done():
                return {"type": "http.disconnect"}
            return await message
        finally:
            message.cancel()


class FlexQueue:
    """Of one API process: who waits."""

    def __init__(self, settings: EngineSettings) -> None:
        self._wait_s = settings.flex_wait_s or math.inf
        self._max_waiting = settings.flex_max_waiting
        self._waits: set[FlexWait] = set()

    def enter(self, header: str | None) -> FlexWait | None:
        """A request comes; `header` may say that it waits no longer than so many seconds. None
        where nothing bounds anything. Raises FlexUnavailableError where too many wait, and
        BadFieldError."""
        wait_s = min(self._wait_s, math.inf if header is None else _seconds(header))
        if wait_s == math.inf and not self._max_waiting:
            return None
        self._waits = {wait for wait in self._waits if not wait.has_begun}
        if self._max_waiting and len(self._waits) >= self._max_waiting:
            REFUSED.labels("full").inc()
            message = f"{len(self._waits)} flex requests wait already, and no more may."
            raise FlexUnavailableError(message, wait_s)
        wait = FlexWait(wait_s)
        self._waits.add(wait)
        _current.set(wait)
        return wait

    def leave(self, wait: FlexWait) -> None:
        self._waits.discard(wait)
        wait.end()


def forget_wait() -> None:
    """What this task asks of the engine from here on is no flex request's."""
    _current.set(None)


def watch(engine_client: Any) -> None:
    """Let each wait know of what is asked of the engine for its request."""
    tell_of_requests(engine_client, _tell)


def _tell(_processor: Any, _request: Any, state: Any) -> None:
    if (wait := _current.get()) is not None:
        wait.asks(state)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        name = WAIT_HEADER.decode()
        raise BadFieldError(name, f"{name} must be a number of seconds above 0, not {text!r}.")
    return value
