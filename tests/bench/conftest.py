"""A fake server, and an event loop whose clock jumps: a minute of load takes milliseconds."""

from __future__ import annotations

import asyncio
import selectors
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel


class JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for the next timer, moves the clock to it."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            assert timeout is not None, "everything waits for everything else"
            self.now_s += timeout
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop on a selector's clock, which begins at 0."""

    def __init__(self) -> None:
        self._clock = JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


class StreamingTransport(httpx.AsyncBaseTransport):
    """Calls an ASGI app and hands its messages on as they are sent (httpx's own collects them)."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        scope = {"type": "http", "method": request.method, "path": request.url.path}
        task = asyncio.create_task(self._app(scope, receive, messages.put))
        try:
            start = await messages.get()
        except asyncio.CancelledError:
            task.cancel()
            raise
        return httpx.Response(start["status"], stream=_Stream(messages, task))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, messages: asyncio.Queue[dict[str, Any]], task: asyncio.Task[None]) -> None:
        self._messages = messages
        self._task = task

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            message = await self._messages.get()
            yield message["body"]
            if not message["more_body"]:
                return

    async def aclose(self) -> None:
        # The client hung up.
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture
def in_virtual_time() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine on a clock that jumps and begins at 0."""

    def run(main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(main)

    return run


@pytest.fixture
def connect() -> Callable[[Any], httpx.AsyncClient]:
    """An HTTP client of an ASGI app, within this process."""

    def client(app: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=StreamingTransport(app), base_url="http://fake")

    return client


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a tokenizer that knows a few plain words."""
    words = ["Ġone", "Ġtwo", "Ġthree", "Ġfour", "no", "Ġ5"]
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    vocabulary = {word: index for index, word in enumerate(words)}
    Tokenizer(WordLevel(vocabulary, unk_token="no")).save(str(folder / "tokenizer.json"))
    return folder


GPU_SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script of benchmarks/gpu by its name."""
    monkeypatch.syspath_prepend(str(GPU_SCRIPTS))
    before = set(sys.modules)
    yield import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(GPU_SCRIPTS)):
            del sys.modules[name]
