"""The page in a browser, over the real server: a person's eyes, keyboard and screen reader."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.browser import check_nothing_bars_the_way
from tests.server.dashboard_world import KEYS, Series, dashboard_app, served

MODEL = "SmolLM2-135M-Instruct"
CHAT = "/v1/chat/completions"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>alert(1)</script>"
LIMIT_MS = 60_000
REPORT_UNKNOWN_FIELDS = """
const guard = (value) => {
  if (value === null || typeof value !== "object") return value;
  for (const name of Object.keys(value)) value[name] = guard(value[name]);
  if (Array.isArray(value)) return value;
  const report = (name) => { if (typeof name === "string") console.error(`no field ${name}`); };
  return new Proxy(value, { get: (all, name) => (name in all || report(name), all[name]) });
};
const parse = JSON.parse;
JSON.parse = (text) => guard(parse(text));
"""
"""The page reads the feed with JSON.parse: a field that it asks for and that is not there is an
error on its console."""
RENAME = """
const before = JSON.parse;
JSON.parse = (text) => before(text.replaceAll('"ttft_p99_s":', '"ttft_slow_s":'));
"""
expect.set_options(timeout=LIMIT_MS)


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """A new browser at a page. At the end: it said no error, read no field of the feed that is not
    sent, and asked no other machine."""
    complaints: list[str] = []
    asked: set[str] = set()
    contexts = []

    def complain(message: Any) -> None:
        # Chromium reports every answer 401 itself; asking for a key begins with one.
        if message.type in ("error", "warning") and "401 (Unauthorized)" not in message.text:
            complaints.append(message.text)

    def go_on(route: Route) -> None:
        asked.add(route.request.url)
        route.continue_()

    def open_one(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.route("**/*", go_on)
        context.add_init_script(REPORT_UNKNOWN_FIELDS)
        page = context.new_page()
        page.set_default_timeout(LIMIT_MS)
        page.on("console", complain)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert complaints == []
    assert {urlsplit(url).hostname for url in asked} == {"127.0.0.1"}


def body(prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": MODEL, "messages": messages, "max_tokens": max_tokens, **more}


def submit(url: str, name: str, max_tokens: int, lines: int, key: str = "", **more: Any) -> str:
    asked = [
        {"custom_id": str(n), "method": "POST", "url": CHAT}
        | {"body": body(f"Number {n}", max_tokens, **more)}
        for n in range(lines)
    ]
    content = "\n".join(json.dumps(each) for each in asked)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        upload = {"files": {"file": ("in.jsonl", content)}, "data": {"purpose": "batch"}}
        file = client.post("/v1/files", **upload).json()["id"]  # type: ignore[arg-type]
        wanted = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        made = client.post("/v1/batches", json={**wanted, "metadata": {"name": name}})
    assert made.status_code == 200, made.text
    return str(made.json()["id"])


def row(page: Page, batch_id: str) -> Any:
    return page.locator("#batch-table tbody tr").filter(has_text=batch_id)


@pytest.mark.server
def test_a_day_at_the_page(server: Any, open_page: Callable[..., Page]) -> None:
    """Chat and a batch come; figures, charts and progress move; the batch is cancelled by
    keyboard alone; the other one, with a hostile name, ends, and its name is text."""
    page = open_page(f"{server.url}/dashboard")
    expect(page.locator("#model")).to_have_text(MODEL)
    done = submit(server.url, HOSTILE, max_tokens=4, lines=24)
    long = submit(server.url, "long one", max_tokens=6000, lines=8, ignore_eos=True)
    before = page.locator("#harvest-total").inner_text()
    expect(page.locator("#state")).to_have_text("Serving")
    httpx.post(f"{server.url}{CHAT}", json=body("Hello", 12), timeout=120).raise_for_status()
    expect(page.locator("#chat-verdict")).to_have_attribute("data-state", re.compile("safe|late"))
    expect(page.locator("#ttft-meter .figures")).to_contain_text("P99")
    expect(page.locator("#harvest-total")).not_to_have_text(before)
    expect(page.locator("#memory-used")).not_to_have_text("\u2013")
    expect(page.locator("#tokens .plots")).to_have_attribute(
        "aria-label", re.compile(r"offline [1-9]")
    )
    expect(row(page, done).locator(".counts")).to_contain_text(re.compile("[1-9][0-9]* of 24"))
    expect(row(page, done).locator(".name")).to_have_text(HOSTILE)
    cancel_by_keyboard(page, long)
    expect(row(page, done).locator(".chip")).to_have_text("completed")
    expect(row(page, done).locator("button")).to_be_hidden()
    page.reload()  # the history is the server's
    expect(page.locator("#tokens .plots")).to_have_attribute("aria-label", re.compile("Tokens"))
    page.locator("#tokens summary").press("Enter")
    cells = page.locator("#tokens details td")
    expect(cells.first).to_be_visible()
    assert any(text not in ("\u2013", "0") for text in cells.all_inner_texts())
    assert page.title() == f"{MODEL} · ConServe"
    assert page.locator("#batches img, #batches script").count() == 0


def cancel_by_keyboard(page: Page, batch_id: str) -> None:
    line = row(page, batch_id)
    expect(line.locator(".chip")).to_have_text("in progress")
    line.locator("button").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#cancel-dialog")).to_be_visible()
    expect(page.locator("#cancel-name")).to_contain_text(batch_id)
    page.keyboard.press("Escape")
    expect(page.locator("#cancel-dialog")).to_be_hidden()
    expect(line.locator("button")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#cancel-no")).to_be_focused()  # the harmless one
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(line.locator(".chip")).to_have_text(re.compile("cancelling|cancelled"))
    expect(line.locator(".chip")).to_have_text("cancelled")


@contextmanager
def guarded(folder: Path) -> Iterator[tuple[str, Any, Series]]:
    """A server that wants a key, without an engine: its address, itself, its series."""
    series = Series()
    with served(dashboard_app(folder, series)) as (url, server):
        yield url, server, series


def test_a_key_is_asked_for_and_kept_out_of_addresses(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    with guarded(tmp_path) as (url, _, _):
        mine = submit(url, "first's", max_tokens=4, lines=1, key=KEYS[0])
        submit(url, "second's", max_tokens=4, lines=1, key=KEYS[1])
        page = open_page(f"{url}/dashboard")
        expect(page.locator("#key")).to_be_focused()
        assert page.locator("#model").inner_text() == ""
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_have_text("The server does not know that key.")
        page.locator("#key").fill(f"{KEYS[0]}\u200b")
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_have_text(re.compile("ASCII letters only"))
        page.locator("#key").fill(KEYS[0])
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("pretend-model")
        expect(page.locator("#batch-table tbody tr")).to_have_count(1)
        expect(row(page, mine)).to_have_count(1)
        assert KEYS[0] not in page.url
        page.reload()
        expect(page.locator("#model")).to_have_text("pretend-model")
        page.locator("#forget").click()
        expect(page.locator("#key")).to_be_visible()


def test_a_lost_server_is_said_and_what_was_seen_is_greyed(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    with guarded(tmp_path) as (url, server, _):
        page = signed_in(open_page, url)
        expect(page.locator("#banner")).to_be_hidden()
        server.config.app.state.leaving = True
        expect(page.locator("#state")).to_have_text("Connection lost")
        expect(page.locator("#banner")).to_contain_text("The server is stopping. Last figures from")
        assert page.evaluate("getComputedStyle(document.querySelector('main')).filter") != "none"
        server.config.app.state.leaving = False  # it is back
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator("#state")).to_have_text("Ready")


def test_a_field_that_is_not_sent_is_noticed(tmp_path: Path, browser: Browser) -> None:
    """The negative control of what every page of `open_page` is held to."""
    with guarded(tmp_path) as (url, _, _), browser.new_context() as context:
        for script in (REPORT_UNKNOWN_FIELDS, RENAME):
            context.add_init_script(script)
        page = context.new_page()
        page.goto(f"{url}/dashboard")
        page.locator("#key").fill(KEYS[0])
        told = "no field ttft_p99_s"
        with page.expect_console_message(lambda said: said.text == told, timeout=LIMIT_MS):
            page.keyboard.press("Enter")


OTHER_VERSION = """
const before = JSON.parse;
JSON.parse = (text) => before(text.replaceAll('"chat":', '"talk":'));
"""


def test_a_server_of_another_version_is_no_server_that_is_away(
    tmp_path: Path, browser: Browser
) -> None:
    with guarded(tmp_path) as (url, _, _), browser.new_context() as context:
        context.add_init_script(OTHER_VERSION)
        page = context.new_page()
        page.goto(f"{url}/dashboard")
        page.locator("#key").fill(KEYS[0])
        with page.expect_event("pageerror", timeout=LIMIT_MS) as error:
            page.keyboard.press("Enter")
        assert "cannot take what the feed says" in str(error.value)
        expect(page.locator("#banner")).to_contain_text("Load the page again.")


def signed_in(open_page: Callable[..., Page], url: str, **options: Any) -> Page:
    page = open_page(f"{url}/dashboard", **options)
    page.locator("#key").fill(KEYS[0])
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text("pretend-model")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_bars_the_way(
    tmp_path: Path, open_page: Callable[..., Page], scheme: Any, width: int
) -> None:
    """And nothing sticks out of a narrow screen."""
    with guarded(tmp_path) as (url, _, series):
        submit(url, HOSTILE, max_tokens=4, lines=3, key=KEYS[0])
        series.observe("ttft_seconds", 0.3, 1.9)
        series.count("displaced_requests", 2)
        series.count("chat_seconds", 60)
        series.count("chat_alone_seconds", 50)
        series.gauge("oldest_offline_wait_seconds", 5400)
        size = {"width": width, "height": 900}
        page = signed_in(open_page, url, color_scheme=scheme, viewport=size)
        expect(page.locator("#batch-table tbody tr")).to_have_count(1)
        page.locator("#tokens summary").press("Enter")
        check_nothing_bars_the_way(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="Cancel").first.click()
        check_nothing_bars_the_way(page)


def test_where_the_server_stands_and_who_starves_cannot_be_missed(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    with guarded(tmp_path) as (url, _, series):
        page = signed_in(open_page, url)
        expect(page.locator("#longest-wait")).to_have_text("\u2013")
        series.count("chat_seconds", 60)
        series.count("chat_alone_seconds", 50)
        expect(page.locator("#standing-text")).to_have_text("chat 1.2x of alone")
        series.gauge("oldest_offline_wait_seconds", 5400)
        expect(page.locator("#longest-wait")).to_have_text("1 h 30 min")
        expect(page.locator("#banner")).to_contain_text("Offline work starves")


def test_the_time_shown_is_chosen_by_keyboard(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    with guarded(tmp_path) as (url, _, _):
        page = signed_in(open_page, url)
        hour = page.get_by_role("button", name="1 h")
        hour.focus()
        page.keyboard.press("Space")
        expect(hour).to_have_attribute("aria-pressed", "true")
        expect(page.get_by_role("button", name="2 min")).to_have_attribute("aria-pressed", "false")
