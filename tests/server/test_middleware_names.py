"""The names that `--middleware` takes, given to an app as plain vLLM gives them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from conserve.server.start.middleware import (
    BATCHES,
    DASHBOARD,
    DRAINING,
    LOGS,
    REDIRECTS,
    TIERS,
    USAGE,
)
from tests.server.vllms_app import Engine, engine_config, named, started, vllms_app

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CHAT = "/v1/chat/completions"
Works = Callable[[httpx.AsyncClient], Awaitable[bool]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("CONSERVE_BATCH_DATA_DIR", str(tmp_path))
    app = vllms_app(Engine(engine_config()))

    @app.post(CHAT)
    async def chat(request: Request) -> Any:
        return await request.json()

    return app


async def writes_a_line_a_minute(client: httpx.AsyncClient) -> bool:
    return "conserve-log" in {task.get_name() for task in asyncio.all_tasks()}


async def serves_batches(client: httpx.AsyncClient) -> bool:
    return (await client.get("/v1/batches")).status_code == 200


async def serves_the_page(client: httpx.AsyncClient) -> bool:
    return (await client.get("/dashboard")).status_code == 200


async def reads_the_tier(client: httpx.AsyncClient) -> bool:
    answer = await client.post(CHAT, json={"service_tier": "flex"})
    return bool(answer.json().get("priority") == 1)


async def redirects_relatively(client: httpx.AsyncClient) -> bool:
    return (await client.get(f"{CHAT}/")).headers["location"] == "../completions"


async def counts_usage(client: httpx.AsyncClient) -> bool:
    return "conserve-usage" in {task.get_name() for task in asyncio.all_tasks()}


async def drains(client: httpx.AsyncClient) -> bool:
    client._transport.app.state.engine_client.shutdown(timeout=0)  # type: ignore[attr-defined]
    return (await client.get("/health")).status_code == 503


NAMES: dict[str, Works] = {
    "conserve.server.draining.DrainingMiddleware": drains,
    "conserve.server.tiers.ServiceTierMiddleware": reads_the_tier,
    "conserve.server.batches.middleware.BatchesMiddleware": serves_batches,
    "conserve.server.batches_middleware.BatchesMiddleware": serves_batches,
    "conserve.server.logs.middleware.LogsMiddleware": writes_a_line_a_minute,
    "conserve.server.logs_middleware.LogsMiddleware": writes_a_line_a_minute,
    "conserve.server.dashboard.middleware.DashboardMiddleware": serves_the_page,
    "conserve.server.redirects.RelativeRedirectsMiddleware": redirects_relatively,
    "conserve.server.usage.middleware.UsageMiddleware": counts_usage,
}
BESIDE = {USAGE: (BATCHES,)}
"""What a name needs that comes after it."""


@pytest.mark.parametrize(("name", "works"), NAMES.items())
async def test_a_name_brings_what_it_stands_for(app: FastAPI, name: str, works: Works) -> None:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        for each in (name, *BESIDE.get(name, ())):
            app.add_middleware(named(each))
        async with started(app):
            assert await works(client)


@pytest.mark.parametrize("works", dict.fromkeys(NAMES.values()))
async def test_without_a_name_there_is_none_of_it(app: FastAPI, works: Works) -> None:
    async with (
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        started(app),
    ):
        assert not await works(client)


def test_the_names_in_the_documentation_and_of_conserve_serve_are_among_them() -> None:
    text = "\n".join(page.read_text() for page in DOCUMENTS)
    told = set(re.findall(r"conserve\.server[\w.]*Middleware", text))
    assert told
    assert {*told, DRAINING, TIERS, LOGS, BATCHES, USAGE, DASHBOARD, REDIRECTS} <= set(NAMES)
