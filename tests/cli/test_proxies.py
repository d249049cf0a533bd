"""With a proxy in the environment, what listens on this machine is talked to directly."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conserve.batch.connection import (
    UnusableSettingError,
    async_client_for,
    client_for,
    is_loopback,
)
from conserve.bench.ports import free_port
from conserve.bench.server import Server
from conserve.cli.main import app

DEAD = "127.0.0.1:9"
"""The discard port: nobody listens there."""
PROXIES = [
    {"HTTP_PROXY": f"http://{DEAD}", "HTTPS_PROXY": f"http://{DEAD}"},
    {"ALL_PROXY": f"http://{DEAD}"},
    {"ALL_PROXY": f"socks5://{DEAD}"},
    {"http_proxy": f"socks5h://{DEAD}"},
]


@pytest.fixture(params=PROXIES, ids=lambda named: "-".join(named).lower())
def dead_proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


class Answers(BaseHTTPRequestHandler):
    """A list of batches, a feed of one tick, a health check; and what was asked of it."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = json.dumps({"data": []}).encode()
        self.send_response(404 if self.path.startswith("/dashboard") else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def answering() -> Iterator[tuple[str, list[str]]]:
    """The URL of a server on this machine, and the paths it was asked for."""
    asked: list[str] = []
    handler = type("Handler", (Answers,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("dead_proxy")
def test_batch_and_top_reach_this_machine() -> None:
    with answering() as (url, asked):
        listed = CliRunner().invoke(app, ["batch", "list", "--json", "--url", url])
        assert (listed.exit_code, listed.stdout.strip()) == (0, "[]"), listed.output
        topped = CliRunner().invoke(app, ["top", url, "--once"])
        assert "has no live page" in topped.stderr
    assert asked == ["/v1/batches?limit=20", "/dashboard/feed"]


@pytest.mark.usefixtures("dead_proxy")
def test_demo_and_bench_see_their_server_become_healthy(tmp_path: Path) -> None:
    port = free_port()
    script = f"""
from http.server import *
class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", {port}), Healthy).serve_forever()
"""
    with Server([sys.executable, "-c", script], {}, port, tmp_path / "log") as server:
        assert server.wait_until_healthy(60) < 60


@pytest.mark.usefixtures("dead_proxy")
@pytest.mark.anyio
async def test_what_demo_and_bench_send_reaches_this_machine() -> None:
    with answering() as (url, asked):
        async with async_client_for(url, base_url=url) as client:
            assert (await client.get("/metrics")).status_code == 200
    assert asked == ["/metrics"]


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        (f"http://{DEAD}", "does not answer"),
        (f"socks5://{DEAD}", "needs the package socksio"),
        ("gopher://nowhere", "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: Unknown scheme"),
    ],
)
@pytest.mark.parametrize("words", [["batch", "list", "--url"], ["top", "--once"]])
def test_a_server_elsewhere_is_reached_through_the_proxy(
    proxy: str, message: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setitem(sys.modules, "socksio", None)
    done = CliRunner().invoke(app, [*words, "http://models.example"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_the_proxy_error_is_one_for_both_kinds_of_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://nowhere")
    for connect in (client_for, async_client_for):
        with pytest.raises(UnusableSettingError):
            connect("http://models.example")


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://localhost:8000", True),
        ("https://api.localhost/v1", True),
        ("http://127.0.0.1:8000/v1/", True),
        ("http://127.9.9.9", True),
        ("http://[::1]:8000", True),
        ("http://0.0.0.0:8000", True),
        ("http://10.0.0.7:8000", False),
        ("http://models.example", False),
        ("http://localhost.example", False),
        ("not-a-url", False),
        ("http://[broken", False),
    ],
)
def test_what_loopback_is(url: str, here: bool) -> None:
    assert is_loopback(url) == here


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
