"""Which requests of browsers our routes answer: the table, and routes that look at it."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from conserve.server import pages
from conserve.server.pages import is_foreign, is_local
from tests.server.dashboard_world import Series, dashboard_app

pytestmark = pytest.mark.anyio

EVIL = "https://evil.example"
PORTAL = "https://portal.example"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize(
    ("method", "headers", "foreign"),
    [
        # programs
        ("POST", {}, False),
        ("DELETE", {}, False),
        # the live page: on this machine, on plain http, behind proxies
        ("POST", {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, False),
        ("POST", {"origin": "http://here:8000"}, False),
        ("GET", {"sec-fetch-site": "same-origin"}, False),
        ("POST", {"origin": "https://here:8000"}, False),
        ("POST", {"origin": "https://llm.example", "sec-fetch-site": "same-origin"}, False),
        ("POST", {"origin": "http://llm.example", "x-forwarded-host": "llm.example"}, False),
        # the user: an address typed, a link followed
        ("GET", {"sec-fetch-site": "none"}, False),
        ("GET", {"sec-fetch-site": "cross-site"}, False),
        # other pages: forms, fetches that may not be read, fetches that may
        ("POST", {"origin": EVIL, "sec-fetch-site": "cross-site"}, True),
        ("POST", {"origin": "http://localhost:3000", "sec-fetch-site": "same-site"}, True),
        ("GET", {"origin": EVIL, "sec-fetch-site": "cross-site"}, True),
        ("POST", {"sec-fetch-site": "cross-site"}, True),
        ("POST", {"origin": "null", "sec-fetch-site": "cross-site"}, True),
        ("POST", {"origin": EVIL}, True),
        ("GET", {"origin": EVIL}, True),
        ("POST", {"origin": "null"}, True),
        ("POST", {"origin": ""}, True),
        ("POST", {"origin": "http://here:8001"}, True),
        ("POST", {"origin": "http://here:8000.evil.example"}, True),
        # those that the operator names
        ("POST", {"origin": PORTAL, "sec-fetch-site": "cross-site"}, False),
        ("DELETE", {"origin": PORTAL}, False),
        ("POST", {"origin": f"{PORTAL}.evil.example"}, True),
    ],
)
def test_the_table(method: str, headers: Mapping[str, str], foreign: bool) -> None:
    assert is_foreign(method, {"host": "here:8000", **headers}, [PORTAL]) == foreign


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("", True),
        ("localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("192.168.1.7", True),
        ("workstation", True),
        ("conserve.default.svc.cluster.local", True),
        ("app.localhost", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("local", True),
        ("evillocal.example", False),
    ],
)
def test_names_that_nobody_else_can_point_here(name: str, local: bool) -> None:
    assert is_local(name) == local


CALLS = [
    ("GET", "/v1/files"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files/x/content"),
    ("DELETE", "/v1/files/x"),
    ("GET", "/v1/batches"),
    ("POST", "/v1/batches"),
    ("POST", "/v1/batches/x/cancel"),
    ("GET", "/dashboard/feed"),
]


@asynccontextmanager
async def asking(
    folder: Path, address: str, client_address: str = "10.0.0.9", **args: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server with these arguments; `address` is where its connections arrive."""
    app = dashboard_app(folder, Series(), keys=args.get("api_key") or [])
    app.state.args = Namespace(**{"api_key": None, "allowed_origins": [], **args})
    app.state.leaving = True

    async def at(scope: Any, receive: Any, send: Any) -> None:
        ends = {"server": (address, 8000), "client": (client_address, 50_000)}
        await app({**scope, **ends}, receive, send)

    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(at), base_url="http://here:8000") as client,
    ):
        yield client


async def codes(client: httpx.AsyncClient, headers: Mapping[str, str]) -> set[str | None]:
    """Error codes of all calls; None where there was none."""
    found: set[str | None] = set()
    for method, path in CALLS:
        answer = await client.request(method, path, headers=headers)
        found.add(answer.json()["error"]["code"] if answer.is_error else None)
    return found


@pytest.mark.parametrize("keys", [[], ["k"]])
async def test_every_route_of_ours_refuses_other_pages(tmp_path: Path, keys: list[str]) -> None:
    async with asking(tmp_path, "127.0.0.1", api_key=keys) as client:
        assert await codes(client, {"origin": EVIL}) == {"foreign_page"}
        assert "foreign_page" not in await codes(client, {"origin": "http://here:8000"})
        assert "foreign_page" not in await codes(client, {})


@pytest.mark.parametrize("allowed", [EVIL, "*"])
async def test_an_origin_is_the_operators_to_allow(tmp_path: Path, allowed: str) -> None:
    async with asking(tmp_path, "127.0.0.1", allowed_origins=[allowed]) as client:
        assert "foreign_page" not in await codes(client, {"origin": EVIL, "host": "evil.example"})


REBOUND = {"host": "evil.example:8000"}
"""What a browser sends for a page whose name points here: all of one origin."""


@pytest.mark.parametrize(
    ("address", "client_address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1"),  # as a socket for IPv6 and IPv4 has it
        ("10.0.0.5", "10.0.0.5"),
    ],
)
async def test_a_name_that_may_be_anybodys_does_not_reach_this_machine(
    tmp_path: Path, address: str, client_address: str
) -> None:
    async with asking(tmp_path, address, client_address) as client:
        assert await codes(client, REBOUND) == {"foreign_page"}
        message = (await client.get("/v1/files", headers=REBOUND)).json()["error"]["message"]
    assert "--api-key" in message
    assert "https://evil.example" in message


@pytest.mark.parametrize(
    ("address", "args"),
    [
        ("127.0.0.1", {"api_key": ["k"]}),  # such a page has no key
        ("10.0.0.5", {}),  # from another machine, by whatever name it knows
        ("/run/conserve.sock", {}),
        ("127.0.0.1", {"allowed_origins": ["https://evil.example"]}),
    ],
)
async def test_where_any_name_will_do(tmp_path: Path, address: str, args: Any) -> None:
    async with asking(tmp_path, address, **args) as client:
        assert "foreign_page" not in await codes(client, REBOUND)


async def test_the_machines_own_name_is_its(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is asked for beside the event loop: the resolver may take seconds."""
    threads = []

    def names() -> frozenset[str]:
        threads.append(threading.get_ident())
        return frozenset({"gpu1.lab.example"})

    monkeypatch.setattr(pages, "own_names", names)
    async with asking(tmp_path, "127.0.0.1") as client:
        assert "foreign_page" not in await codes(client, {"host": "gpu1.lab.example:8000"})
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("headers", [{"host": "[::1"}, {"origin": "http://[::1"}])
async def test_what_is_no_address_is_no_friend(tmp_path: Path, headers: Any) -> None:
    async with asking(tmp_path, "127.0.0.1") as client:
        assert await codes(client, headers) == {"foreign_page"}


@pytest.mark.engine
@pytest.mark.parametrize("vllm_names", [True, False])
@pytest.mark.parametrize("sent", [{}, {"x-request-id": "mine"}])
async def test_an_answer_has_one_request_id(
    tmp_path: Path, sent: dict[str, str], *, vllm_names: bool
) -> None:
    """Also with vLLM's `--enable-request-id-headers`."""
    pytest.importorskip("vllm")
    from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware

    app = dashboard_app(tmp_path, Series(), keys=[])
    app.state.args = Namespace(
        api_key=None, allowed_origins=[], enable_request_id_headers=vllm_names
    )
    if vllm_names:
        app.add_middleware(XRequestIdMiddleware)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client,
    ):
        for path in ("/v1/files", "/v1/batches/batch_none"):
            (named,) = (await client.get(path, headers=sent)).headers.get_list("x-request-id")
            assert named == sent.get("x-request-id", named)
