"""What a page can do to the server in a real browser: a stranger's, and our own behind a proxy."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect
from starlette.requests import Request
from starlette.responses import HTMLResponse, StreamingResponse

from conserve.server.asgi import Receive, Scope, Send
from conserve.server.redirects import RelativeRedirectsMiddleware
from tests.server.certificate import make_certificate
from tests.server.dashboard_world import Series, dashboard_app, served

LINE = (
    '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", '
    '"body": {"model": "m", "messages": []}}'
)
LIMIT_MS = 60_000
ATTACK = """async ([url, id]) => {
  const form = new FormData();
  form.append("purpose", "batch");
  form.append("file", new Blob(["x"]), "planted.jsonl");
  const blind = { method: "POST", mode: "no-cors" };
  await fetch(`${url}/v1/files`, { ...blind, body: form });
  await fetch(`${url}/v1/batches/${id}/cancel`, blind);
  const read = (path) => fetch(`${url}${path}`).then((answer) => answer.text(), () => "unreadable");
  return [await read("/v1/files"), await read(`/v1/batches/${id}`)];
}"""
"""What a visited page can send without asking first, and what it would like to read."""


@contextmanager
def open_server(folder: Path, **args: Any) -> Iterator[str]:
    """A server without keys on this machine."""
    app = dashboard_app(folder, Series(), keys=[])
    app.state.args = Namespace(**{"api_key": None, "allowed_origins": [], **args})
    app.root_path = args.get("root_path", "")
    app.add_middleware(RelativeRedirectsMiddleware)
    with served(app) as (url, _):
        yield url


@contextmanager
def stranger() -> Iterator[str]:
    """A page elsewhere, by a name of its own."""

    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        await HTMLResponse("<title>Harmless</title>")(scope, receive, send)

    with served(page, lifespan="off") as (url, _):
        yield url.replace("127.0.0.1", "stranger.example")


def batch_at(url: str) -> str:
    upload: Any = {"files": {"file": ("mine.jsonl", LINE)}, "data": {"purpose": "batch"}}
    file = httpx.post(f"{url}/v1/files", **upload).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions"}
    made = httpx.post(f"{url}/v1/batches", json={**asked, "completion_window": "24h"})
    return str(made.json()["id"])


def state_of(url: str, batch_id: str) -> tuple[set[str], bool]:
    """Names of the files there, and whether the batch goes on."""
    files = httpx.get(f"{url}/v1/files").json()["data"]
    status = httpx.get(f"{url}/v1/batches/{batch_id}").json()["status"]
    return {file["filename"] for file in files}, not status.startswith("cancel")


def test_a_visited_page_neither_writes_nor_reads(tmp_path: Path, browser: Browser) -> None:
    with open_server(tmp_path) as url, stranger() as elsewhere, browser.new_context() as context:
        mine = batch_at(url)
        page = context.new_page()
        page.goto(elsewhere)
        assert page.evaluate(ATTACK, [url, mine]) == ["unreadable", "unreadable"]
        assert state_of(url, mine) == ({"mine.jsonl"}, True)


def test_the_same_page_could_where_every_origin_is_allowed(
    tmp_path: Path, browser: Browser
) -> None:
    """The negative control: it is our answer that stops it."""
    with (
        open_server(tmp_path, allowed_origins=["*"]) as url,
        stranger() as elsewhere,
        browser.new_context() as context,
    ):
        mine = batch_at(url)
        page = context.new_page()
        page.goto(elsewhere)
        page.evaluate(ATTACK, [url, mine])
        names, goes_on = state_of(url, mine)
        assert "planted.jsonl" in names
        assert not goes_on


@pytest.mark.parametrize("allowed", [[], ["http://rebound.example"]])
def test_a_name_pointed_here_reads_nothing(
    tmp_path: Path, browser: Browser, allowed: list[str]
) -> None:
    """And reads all where the operator says that the name is right: to the browser, both are the
    same."""
    with (
        open_server(tmp_path, allowed_origins=allowed) as url,
        browser.new_context() as context,
    ):
        page = context.new_page()
        page.goto(f"{url.replace('127.0.0.1', 'rebound.example')}/openapi.json")
        ask = "(path) => fetch(path).then((answer) => answer.status)"
        codes = {page.evaluate(ask, path) for path in ("/v1/files", "/v1/batches")}
        assert codes == ({200} if allowed else {403})


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@contextmanager
def proxied(url: str, *, keeps_host: bool, **options: Any) -> Iterator[str]:
    """A proxy that cuts /llm off before it asks `url`: what a browser opens."""

    async def pass_on(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        path = scope["path"].removeprefix("/llm")
        headers = [pair for pair in request.headers.items() if keeps_host or pair[0] != "host"]
        client = httpx.AsyncClient(base_url=url, timeout=60, trust_env=False)
        asked = client.build_request(
            request.method, path, headers=headers, content=await request.body()
        )
        async with client:
            answer = await client.send(asked, stream=True)
            passed = StreamingResponse(answer.aiter_raw(), answer.status_code, dict(answer.headers))
            await passed(scope, receive, send)

    with served(pass_on, lifespan="off", **options) as (outside, _):
        yield f"{outside.replace('127.0.0.1', 'llm.example')}/llm"


def cancels_on_the_page(page: Page, address: str, batch_id: str) -> None:
    page.set_default_timeout(LIMIT_MS)
    page.goto(f"{address}/dashboard/")
    row = page.locator("#batch-table tbody tr").filter(has_text=batch_id)
    row.get_by_role("button", name="Cancel").click()
    page.locator("#cancel-yes").click()
    expect(row.locator(".chip")).to_have_text(re.compile("cancel"), timeout=LIMIT_MS)
    assert page.url == f"{address}/dashboard"


@pytest.mark.parametrize("keeps_host", [False, True])
def test_the_live_page_works_behind_a_proxy(
    tmp_path: Path, browser: Browser, certificate: dict[str, Path], keeps_host: bool
) -> None:
    """With https and a prefix. A name that the proxy passes on is to be known here."""
    allowed = ["https://llm.example"] if keeps_host else []
    with (
        open_server(tmp_path, root_path="/llm", allowed_origins=allowed) as url,
        proxied(url, keeps_host=keeps_host, **certificate) as address,
        browser.new_context(ignore_https_errors=True) as context,
    ):
        cancels_on_the_page(context.new_page(), address, batch_at(url))


def test_the_live_page_works_behind_a_proxy_without_https(tmp_path: Path, browser: Browser) -> None:
    with (
        open_server(tmp_path, allowed_origins=["http://llm.example"]) as url,
        proxied(url, keeps_host=True) as address,
        browser.new_context() as context,
    ):
        cancels_on_the_page(context.new_page(), address, batch_at(url))
