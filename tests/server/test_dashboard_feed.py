"""The feed and who may read it: keys, tenants, headers, and how it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from conserve.server.dashboard.collector import Collector
from conserve.server.dashboard.feed import stream
from conserve.server.dashboard.messages import Batches, Bye, Hello, Message, Tick, encode
from conserve.server.dashboard.routes import KINDS, page_files
from conserve.server.dashboard.status import Status
from conserve.server.dashboard.terminal import messages_in
from tests.server.dashboard_world import KEYS, Series, dashboard_app, said
from tests.server.vllms_app import Engine, engine_config, started, vllms_app

pytestmark = pytest.mark.anyio
LINE: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
LINE |= {"body": {"model": "m", "messages": [{"role": "user", "content": "hello"}]}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[FastAPI]:
    app = dashboard_app(tmp_path, Series())
    async with app.router.lifespan_context(app):
        yield app


@asynccontextmanager
async def client(app: FastAPI, key: str = "") -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", headers=headers
    ) as one:
        yield one


async def feed(app: FastAPI, key: str) -> dict[type[Message], Any]:
    """The last message of each kind, of a feed that ends after its first news."""
    app.state.leaving = False
    async with client(app, key) as one:
        reading = asyncio.create_task(one.get("/dashboard/feed"))
        await asyncio.sleep(0.3)  # any time will do: what is awaited is the end
        app.state.leaving = True
        answer = await reading
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    told = list(messages_in(answer.text.splitlines()))
    assert b"".join(map(encode, told)) == answer.content, "it says what no record names"
    return {type(message): message for message in told}


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer ", "Bearer wrong", f"Basic {KEYS[0]}", KEYS[0], f"Bearer {KEYS[0]} "],
)
async def test_the_feed_needs_one_of_the_servers_keys(app: FastAPI, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    async with client(app) as one:
        answer = await one.get("/dashboard/feed", headers=headers)
    assert answer.status_code == 401
    error = answer.json()["error"]
    assert error["code"] == "invalid_api_key"
    assert "Bearer KEY" in error["message"]


@pytest.mark.parametrize("key", KEYS)
async def test_any_of_its_keys_opens_it(app: FastAPI, key: str) -> None:
    heard = await feed(app, key)
    assert heard[Hello].facts.model == "pretend-model"
    assert heard[Bye].text == "The server is stopping."
    assert heard[Tick].summary.server.state == "ready"


async def test_a_key_sees_its_own_batches_only(app: FastAPI) -> None:
    async with client(app, KEYS[0]) as one:
        content = json.dumps(LINE)
        file = await one.post(
            "/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"}
        )
        asked = {"input_file_id": file.json()["id"], "endpoint": LINE["url"]}
        asked |= {"completion_window": "24h", "metadata": {"name": "mine"}}
        made = await one.post("/v1/batches", json=asked)
        assert made.status_code == 200, made.text
    (mine,) = (await feed(app, KEYS[0]))[Batches].data
    assert (mine.id, mine.name) == (made.json()["id"], "mine")
    assert (mine.is_ended, mine.is_cancellable) == (False, True)
    assert (await feed(app, KEYS[1]))[Batches].data == []


async def test_the_page_is_whole_and_may_load_nothing_else(app: FastAPI) -> None:
    async with client(app) as one:
        page = await one.get("/dashboard")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert (await one.get("/dashboard/absent.js")).status_code == 404
        assert (await one.get("/dashboard/..%2faccess.py")).status_code == 404
        for name in page_files():
            part = await one.get(f"/dashboard/{name}")
            assert part.status_code == 200, name
            assert part.headers["content-security-policy"] == policy
            assert part.headers["content-type"] in KINDS.values()
            assert part.headers["x-content-type-options"] == "nosniff"


def test_the_page_names_no_other_place() -> None:
    for name, content in page_files().items():
        if name.startswith("uplot") or name == "icon.svg":
            continue
        assert b"//cdn" not in content, name
        assert b"http:" not in content, name
        assert b"https:" not in content, name
        assert b"innerHTML" not in content, name


async def test_points_are_sent_once_each() -> None:
    series, leaving = Series(), False
    collector = series.collector(status=Status(leaving=lambda: leaving))
    for _ in range(3):
        await series.after(collector)
    times: list[float] = []
    at_first: list[float] = []
    async for event in stream(collector, None, ""):
        (message,) = messages_in(event.decode().splitlines())
        if isinstance(message, Hello):
            at_first = [point.time_s for point in message.fine]
        if isinstance(message, Tick):
            times += [point.time_s for point in message.fine]
        if isinstance(message, Tick) and len(times) < 4:
            await series.after(collector)
            await series.after(collector)
        leaving = len(times) >= 4
    assert at_first == [1002.0, 1003.0]
    assert times == [1004.0, 1005.0, 1006.0, 1007.0]


@pytest.mark.engine
async def test_inside_vllms_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attached when it starts, told when the engine is to end, and gone without a trace."""
    from conserve.server.dashboard import middleware

    made: list[Collector] = []

    def collector_of(*given: Any) -> Collector:
        made.append(Collector(*given))
        return made[-1]

    monkeypatch.setattr(middleware, "Collector", collector_of)
    engine = Engine(engine_config(_api_process_count=2), told=[0.5, 0.075, "as asked for", "so"])
    app = vllms_app(engine, api_key=["k"])
    app.add_middleware(middleware.DashboardMiddleware)
    async with started(app):
        async with client(app) as one:
            assert (await one.get("/dashboard")).status_code == 200
            assert (await one.get("/dashboard/feed")).status_code == 401
        (collector,) = made
        facts = collector.facts
        assert (facts.model, facts.ttft_target_s, facts.num_processes) == ("org/m", 0.5, 2)
        assert (facts.tbt_target_s, facts.tbt_target_reason) == (0.075, "so")
        assert facts.has_figures
        assert not facts.has_batches
        await collector.changed(0, 60)
        assert said(collector).server.state != "draining"
        engine.shutdown(timeout=3)
        assert engine.shutdowns == [3]
        assert collector.status.draining
    assert engine.is_itself
