"""The site in a browser: searched, on a narrow screen and in the dark, from disk and server."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, expect

from tests.browser import check_nothing_bars_the_way

MAIN = ("index.html", "docs/start.html", "docs/serving.html", "reference/commands.html")


class Quiet(SimpleHTTPRequestHandler):
    def log_request(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.parametrize("place", ["disk", "server"])
def test_search_finds_a_flag_and_no_other_host_is_asked(
    site: Path, served: str, browser: Browser, place: str
) -> None:
    start = f"{site.as_uri()}/" if place == "disk" else served
    asked: set[str | None] = set()
    with browser.new_context() as context:
        page = context.new_page()
        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
        page.goto(f"{start}index.html")
        page.get_by_role("button", name="Search").first.click()
        page.get_by_role("combobox").or_(page.get_by_placeholder("Search")).first.fill("slowdown")
        found = page.locator("a[href*='reference/flags.html']").filter(has_text="slowdown")
        expect(found.first).to_be_visible(timeout=60_000)
    assert asked <= {None, "", "127.0.0.1"}


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 390)])
def test_nothing_bars_the_way(served: str, browser: Browser, scheme: str, width: int) -> None:
    size = {"width": width, "height": 900}
    with browser.new_context(color_scheme=scheme, viewport=size) as context:  # type: ignore[arg-type]
        page = context.new_page()
        for name in MAIN:
            page.goto(served + name)
            check_nothing_bars_the_way(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
