"""A redirect to the other spelling of a path stays on the address that the client used."""

from __future__ import annotations

from urllib.parse import urljoin

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import RedirectResponse

from conserve.server.redirects import RelativeRedirectsMiddleware

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def app() -> FastAPI:
    app = FastAPI(root_path="/llm")

    @app.get("/v1/files")
    @app.get("/folder/")
    @app.get("/named/{name}")
    async def there() -> str:
        return "there"

    @app.get("/away")
    async def away() -> RedirectResponse:
        return RedirectResponse("https://elsewhere.example/away/")

    app.add_middleware(RelativeRedirectsMiddleware)
    return app


@pytest.mark.parametrize("outside", ["https://proxy.example/llm", "https://proxy.example"])
@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("/v1/files/", "/v1/files"),
        ("/v1/files/?limit=1&after=x", "/v1/files?limit=1&after=x"),
        ("/folder", "/folder/"),
        ("/folder?a=b", "/folder/?a=b"),
        ("/named/a:b/", "/named/a:b"),
        ("/named/%C3%A9%20/", "/named/%C3%A9%20"),
    ],
)
async def test_it_keeps_scheme_host_and_prefix(outside: str, path: str, there: str) -> None:
    """The proxy cuts off what `outside` has before the path, as it does for `--root-path`."""
    transport = httpx.ASGITransport(app())
    async with httpx.AsyncClient(transport=transport, base_url="http://inside:8000") as client:
        answer = await client.get(path)
        assert answer.status_code == 307
        assert urljoin(outside + path, answer.headers["location"]) == outside + there
        assert (await client.get(path, follow_redirects=True)).json() == "there"


async def test_a_redirect_of_the_apps_own_is_left_alone() -> None:
    transport = httpx.ASGITransport(app())
    async with httpx.AsyncClient(transport=transport, base_url="http://inside:8000") as client:
        answer = await client.get("/away")
    assert answer.headers["location"] == "https://elsewhere.example/away/"
