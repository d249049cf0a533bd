"""From the signal on: /health says so, nothing new is begun, and what has begun goes on."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
from fastapi.responses import StreamingResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.v1.engine.exceptions import EngineDeadError

from conserve.batch.service import BatchService
from conserve.server import draining
from conserve.server.draining import DrainingMiddleware, wait_for_requests
from conserve.server.errors import EngineDiedError
from conserve.server.start import serve
from conserve.server.start.middleware import BATCHES, add_always
from tests.server.vllms_app import Engine, engine_config, named, started, vllms_app

CHAT = "/v1/chat/completions"
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Served:
    """An app whose chats stream until `open` is set."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.open = engine, asyncio.Event()
        self.begun = asyncio.Event()
        self.app = vllms_app(engine)
        self.app.post(CHAT)(self._chat)
        self.app.post("/v1/messages")(self._chat)
        self.app.get("/health")(self._health)
        self.app.get("/v1/models")(self._health)
        self.app.add_middleware(DrainingMiddleware)

    async def _chat(self) -> StreamingResponse:
        return StreamingResponse(self._tokens(), media_type="text/event-stream")

    async def _tokens(self) -> AsyncIterator[bytes]:
        self.begun.set()
        yield b"data: first\n\n"
        await self.open.wait()
        yield b"data: last\n\n"

    async def _health(self) -> dict[str, str]:
        return {}

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")


async def test_nothing_new_is_begun_and_what_has_begun_ends() -> None:
    served = Served(Engine(engine_config()))
    async with started(served.app), served.client() as client:
        assert (await client.get("/health")).status_code == 200
        stream = asyncio.create_task(client.post(CHAT))
        await served.begun.wait()
        served.engine.shutdown(timeout=10)
        assert (await client.get("/health")).status_code == 503
        late = await client.post(CHAT)
        assert late.status_code == 503
        assert late.headers["retry-after"]
        error = late.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] == 503
        assert "shutting down" in error["message"]
        assert (await client.get("/v1/models")).status_code == 200
        served.open.set()
        assert (await stream).text.endswith("data: last\n\n")
    assert served.engine.shutdowns == [10]


@pytest.mark.parametrize(
    ("errored", "is_told", "died"),
    [(False, False, False), (False, True, False), (True, True, False), (True, False, True)],
)
async def test_a_server_whose_engine_died_does_not_end_well(
    monkeypatch: pytest.MonkeyPatch, *, errored: bool, is_told: bool, died: bool
) -> None:
    """vLLM ends it in order, with status 0, and who restarts what fails would not."""
    monkeypatch.setattr(draining, "engine_died", Event())
    served = Served(Engine(engine_config()))
    async with started(served.app):
        if is_told:
            served.engine.shutdown(timeout=0)
        served.engine.errored = errored
    assert draining.engine_died.is_set() == died
    with pytest.raises(EngineDiedError) if died else nullcontext():
        serve._check_engine()


async def test_what_outlasts_the_engine_ends_with_an_error() -> None:
    served = Served(Engine(engine_config()))
    error = asyncio.get_running_loop().create_future()

    async def tokens() -> AsyncIterator[bytes]:
        served.begun.set()
        yield str(await error).encode()

    served.engine.output_processor.error = error
    served.app.post("/v1/completions")(lambda: StreamingResponse(tokens()))
    async with started(served.app), served.client() as client:
        stream = asyncio.create_task(client.post("/v1/completions"))
        await served.begun.wait()
        await asyncio.to_thread(served.engine.shutdown, timeout=1)
        assert (await stream).text == "The server has shut down before the answer was complete."
    assert isinstance(error.result(), EngineDeadError)
    told = create_error_response(error.result()).error
    assert told.message == "The server has shut down before the answer was complete."


async def test_anthropics_clients_find_their_own_envelope() -> None:
    served = Served(Engine(engine_config()))
    async with started(served.app), served.client() as client:
        served.engine.shutdown(timeout=0)
        late = (await client.post("/v1/messages")).json()
        assert (late["type"], late["error"]["type"]) == ("error", "overloaded_error")


async def test_it_is_known_before_batches_drain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They may take most of the time."""
    monkeypatch.setenv("CONSERVE_BATCH_DATA_DIR", str(tmp_path))
    seen: list[int] = []
    served, stop = Served(Engine(engine_config())), BatchService.stop

    async def look_and_stop(self: BatchService) -> None:
        async with served.client() as client:
            seen.append((await client.get("/health")).status_code)
        await stop(self)

    monkeypatch.setattr(BatchService, "stop", look_and_stop)
    add_always(args := Namespace(middleware=[BATCHES]))
    served.app.user_middleware.clear()
    for name in args.middleware:
        served.app.add_middleware(named(name))
    async with started(served.app):
        await asyncio.to_thread(served.engine.shutdown, timeout=0)
    assert seen[0] == 503


class Core:
    """vLLM's client of engines that another process owns."""

    def __init__(self, owner: bool) -> None:
        self.resources = Namespace(engine_manager=object() if owner else None)
        self.shutdowns: list[float | None] = []

    def shutdown(self, timeout: float | None = None) -> None:
        self.shutdowns.append(timeout)


class Several(Engine):
    """One of several API processes: its shutdown cuts the connection to the engines."""

    def __init__(self, num_requests: int, *, owner: bool) -> None:
        super().__init__(engine_config())
        self.engine_core = Core(owner)
        self.num_requests = num_requests
        self.num_looks = 0

    def get_num_unfinished_requests(self) -> int:
        """One ends between two looks."""
        self.num_looks += 1
        self.num_requests = max(0, self.num_requests - 1)
        return self.num_requests

    def shutdown(self, timeout: float | None = None) -> None:
        super().shutdown(timeout)
        self.engine_core.shutdown(timeout=timeout)


@pytest.mark.parametrize(("owner", "left"), [(False, 0), (True, 3)])
async def test_a_process_without_engines_waits_for_its_streams(
    owner: bool, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining, "LOOK_S", 0.0)
    engine = Several(3, owner=owner)
    served = Served(engine)
    async with started(served.app):
        await asyncio.to_thread(engine.shutdown, timeout=600)
    assert engine.num_requests == left
    (timeout_s,) = engine.engine_core.shutdowns
    assert timeout_s is not None
    assert 0 < timeout_s <= 600


def test_it_waits_no_longer_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr(draining, "time", Namespace(monotonic=lambda: now_s, sleep=sleep))
    endless: Any = Namespace(get_num_unfinished_requests=lambda: 1)
    assert wait_for_requests(endless, 10.0) == pytest.approx(2.0, abs=0.1)
    assert wait_for_requests(endless, 0.0) == 0.0
    assert wait_for_requests(endless, None) is None
