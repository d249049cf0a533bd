"""The batch service inside an app that starts, guards and ends as vLLM's does."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from conserve.server.batches.middleware import BatchesMiddleware
from tests.server import vllms_app
from tests.server.vllms_app import engine_config, started

CHAT = "/v1/chat/completions"
KEYS = ["first key", "second key"]
LIMIT_S = 60.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("CONSERVE_BATCH_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("CONSERVE_BATCH_POLL_S", "0.05")


class Engine(vllms_app.Engine):
    """Notes what ran when it was shut down, too."""

    def __init__(self, served: Server, shutdown_timeout: int) -> None:
        super().__init__(engine_config())
        self.vllm_config.shutdown_timeout = shutdown_timeout
        self.running_then: list[int] = []
        self._served = served

    def shutdown(self, timeout: float | None = None) -> None:
        super().shutdown(timeout)
        self.running_then.append(self._served.running)


class Server:
    """vLLM's app as far as the service sees it. Every chat waits until `open` is set."""

    def __init__(self, keys: list[str], shutdown_timeout: int = 0) -> None:
        self.engine = Engine(self, shutdown_timeout)
        self.open = asyncio.Event()
        self.running = 0
        self.bodies: list[Any] = []
        self.finish_reasons: list[str] = []
        self.app = FastAPI(lifespan=self._lifespan)
        self.app.state.engine_client = self.engine
        self.app.state.args = Namespace(api_key=keys)
        self.app.get("/v1/models")(self._models)
        self.app.post(CHAT)(self._chat)
        self.app.middleware("http")(self._guard)
        self.app.add_middleware(BatchesMiddleware)
        self.keys = keys

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        del app.state

    async def _guard(self, request: Request, call_next: Callable[[Request], Any]) -> Any:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.keys and key not in self.keys:
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        return await call_next(request)

    async def _models(self) -> Any:
        return {"object": "list", "data": [{"id": "m", "max_model_len": 100}]}

    async def _chat(self, request: Request) -> Any:
        self.bodies.append(await request.json())
        # In a task of its own, which ends with the client, as vLLM does it.
        working = asyncio.create_task(self._work())
        listening = asyncio.ensure_future(request.receive())
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        reason = self.finish_reasons.pop(0) if self.finish_reasons else "stop"
        return {"choices": [{"finish_reason": reason, "message": {"content": "hi"}}]}

    async def _work(self) -> None:
        self.running += 1
        try:
            await self.open.wait()
        finally:
            self.running -= 1

    @asynccontextmanager
    async def client(self, key: str = "any") -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app),
            base_url="http://test",
            headers={"authorization": f"Bearer {key}"},
        ) as client:
            yield client


async def submit(client: httpx.AsyncClient, num_lines: int = 1) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    lines = [
        {"custom_id": str(n), "method": "POST", "url": CHAT, "body": body} for n in range(num_lines)
    ]
    content = "\n".join(json.dumps(line) for line in lines)
    files, data = {"file": ("in.jsonl", content)}, {"purpose": "batch"}
    file_id = (await client.post("/v1/files", files=files, data=data)).json()["id"]
    asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    made = await client.post("/v1/batches", json=asked)
    assert made.status_code == 200, made.text
    batch_id: str = made.json()["id"]
    return batch_id


async def until(client: httpx.AsyncClient, batch_id: str, status: str) -> Any:
    async with asyncio.timeout(LIMIT_S):
        while True:
            batch = (await client.get(f"/v1/batches/{batch_id}")).json()
            if batch["status"] == status:
                return batch
            await asyncio.sleep(0.05)


async def eventually(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110  (any condition, not an event)
            await asyncio.sleep(0.02)


pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("keys", [[], KEYS])
async def test_a_batch_runs_through_the_apps_own_checks(keys: list[str]) -> None:
    server = Server(keys)
    server.open.set()
    async with started(server.app), server.client(keys[0] if keys else "any") as client:
        batch = await until(client, await submit(client, 5), "completed")
    assert batch["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
    assert [body["service_tier"] for body in server.bodies] == ["flex"] * 5
    assert server.engine.shutdowns == []


GATEWAY = {"x-gateway": "secret"}


def wants_a_header(server: Server) -> None:
    """As a middleware of the user's may; it stands before everything else."""

    async def gateway(request: Request, call_next: Callable[[Request], Any]) -> Any:
        if request.headers.get("x-gateway") != "secret":
            return JSONResponse({"error": "not through the gateway"}, status_code=403)
        return await call_next(request)

    server.app.middleware("http")(gateway)


async def test_lines_carry_what_the_users_middleware_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSERVE_BATCH_REQUEST_HEADERS", json.dumps(GATEWAY))
    server = Server(KEYS)
    server.open.set()
    wants_a_header(server)
    async with started(server.app), server.client(KEYS[0]) as client:
        client.headers.update(GATEWAY)
        batch = await until(client, await submit(client, 3), "completed")
    assert batch["request_counts"] == {"total": 3, "completed": 3, "failed": 0}


async def test_a_middleware_that_refuses_lines_is_named(caplog: pytest.LogCaptureFixture) -> None:
    server = Server([])
    wants_a_header(server)
    told = "GET /v1/models answers 403. Where a --middleware wants a header"
    async with started(server.app), server.client() as client:
        client.headers.update(GATEWAY)
        await eventually(lambda: any(told in record.getMessage() for record in caplog.records))
        upload: Any = {"files": {"file": ("in.jsonl", "{}")}, "data": {"purpose": "batch"}}
        file_id = (await client.post("/v1/files", **upload)).json()["id"]
        asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        refused = await client.post("/v1/batches", json=asked)
        assert refused.status_code == 503
        assert told in refused.json()["error"]["message"]


async def test_a_key_sees_its_own_batches_only() -> None:
    server = Server(KEYS)
    server.open.set()
    async with started(server.app), server.client(KEYS[0]) as client:
        batch_id = await submit(client)
        async with server.client(KEYS[1]) as other, server.client("no key") as stranger:
            assert (await other.get(f"/v1/batches/{batch_id}")).status_code == 404
            assert (await stranger.get(f"/v1/batches/{batch_id}")).status_code == 401


async def test_without_keys_everybody_is_one() -> None:
    server = Server([])
    server.open.set()
    async with started(server.app), server.client("one") as client, server.client("two") as other:
        batch_id = await submit(client)
        assert (await other.get(f"/v1/batches/{batch_id}")).status_code == 200


async def test_a_cancelled_batch_leaves_the_engine() -> None:
    server = Server([])
    async with started(server.app), server.client() as client:
        batch_id = await submit(client, 3)
        await eventually(lambda: server.running == 3)
        await client.post(f"/v1/batches/{batch_id}/cancel")
        await eventually(lambda: server.running == 0)
        batch = await until(client, batch_id, "cancelled")
    assert batch["request_counts"]["completed"] == 0


async def test_lines_are_given_back_before_the_engine_stops() -> None:
    server = Server([])
    async with started(server.app):
        async with server.client() as client:
            await submit(client, 3)
            await eventually(lambda: server.running == 3)
        await asyncio.to_thread(server.engine.shutdown, timeout=0)
    assert (server.engine.shutdowns, server.engine.running_then) == ([0], [0])
    again = Server([])
    again.open.set()
    async with started(again.app), again.client() as client:
        batch_id = (await client.get("/v1/batches")).json()["data"][0]["id"]
        batch = await until(client, batch_id, "completed")
    assert batch["request_counts"]["completed"] == 3
    assert len(again.bodies) == 3


async def test_a_drain_lets_lines_end_and_takes_its_time_off_the_engines() -> None:
    server = Server([], shutdown_timeout=600)
    async with started(server.app), server.client() as client:
        batch_id = await submit(client, 3)
        await eventually(lambda: server.running == 3)
        stopping = asyncio.create_task(asyncio.to_thread(server.engine.shutdown, timeout=600))
        server.open.set()
        await stopping
        batch = (await client.get(f"/v1/batches/{batch_id}")).json()
    assert batch["request_counts"]["completed"] == 3
    (timeout,) = server.engine.shutdowns
    assert server.engine.running_then == [0]
    assert timeout is not None
    assert 0 < timeout < 600


async def test_an_engine_shut_down_in_the_loop_itself_does_not_wait_for_it() -> None:
    server = Server([])
    async with started(server.app):
        server.engine.shutdown()
        assert (server.engine.shutdowns, server.engine.running_then) == ([None], [0])
    assert server.engine.is_itself


async def test_what_a_stopping_engine_cuts_short_is_run_again() -> None:
    server = Server([])
    server.open.set()
    server.finish_reasons = ["abort", "stop"]
    async with started(server.app), server.client() as client:
        batch = await until(client, await submit(client), "completed")
        lines = (await client.get(f"/v1/files/{batch['output_file_id']}/content")).json()
    assert lines["response"]["body"]["choices"][0]["finish_reason"] == "stop"
    assert len(server.bodies) == 2
