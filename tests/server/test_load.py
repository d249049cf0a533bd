"""`/load`, by vLLM's own counting: offline requests are not in it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.serve.instrumentator.basic import router
from vllm.entrypoints.serve.utils.api_utils import load_aware_call

from conserve.server.tiers.middleware import ServiceTierMiddleware

pytestmark = [pytest.mark.anyio, pytest.mark.engine]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Served:
    """vLLM's counting around requests that last until they are let go."""

    def __init__(self, router_metrics: str) -> None:
        self.app = app = FastAPI()
        self.let_go = asyncio.Event()
        self.num_here = 0
        app.include_router(router)
        app.state.enable_server_load_tracking = True
        app.state.server_load_metrics = 0
        settings = {"conserve": {"router_metrics": router_metrics}}
        app.state.engine_client = SimpleNamespace(
            vllm_config=SimpleNamespace(additional_config=settings), generate=None
        )
        app.post("/v1/completions", response_model=None)(load_aware_call(self._create))
        app.add_middleware(ServiceTierMiddleware)

    async def _create(self, body: dict[str, Any], raw_request: Request) -> Response:
        self.num_here += 1
        await self.let_go.wait()
        return JSONResponse({})


@pytest.mark.parametrize(("router_metrics", "counted"), [("online", 2), ("all", 5)])
async def test_offline_requests_are_not_load(router_metrics: str, counted: int) -> None:
    served = Served(router_metrics)
    transport = httpx.ASGITransport(served.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        tiers = ["flex"] * 3 + ["default"] * 2
        async with asyncio.TaskGroup() as group:
            for tier in tiers:
                body = {"prompt": "x", "service_tier": tier}
                group.create_task(client.post("/v1/completions", json=body))
            while served.num_here < len(tiers):  # noqa: ASYNC110  (no event says it)
                await asyncio.sleep(0)
            assert (await client.get("/load")).json() == {"server_load": counted}
            served.let_go.set()
        assert (await client.get("/load")).json() == {"server_load": 0}
        bad = await client.post("/v1/completions", json=[1])
        assert bad.status_code == 422
        assert (await client.get("/load")).json() == {"server_load": 0}
