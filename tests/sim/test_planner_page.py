"""The planner's page in a browser, from a disk: sliders, figures, keyboard, screen reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from conserve.sim.planner.one_file import one_file
from tests.browser import check_nothing_bars_the_way
from tests.sim.planner_world import grid

LIMIT_MS = 60_000
OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[OpenPage]:
    """The page of a grid in a new browser. At the end: it said no error, and asked nobody."""
    complaints: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_one(found: dict[str, Any], link: str = "", **options: Any) -> Page:
        file = tmp_path / "plan.html"
        file.write_text(one_file(found))
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LIMIT_MS)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{file.as_uri()}{link}")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def text_of(page: Page, name: str) -> str:
    return page.locator(f"#{name}").inner_text()


def test_what_the_sliders_say_and_give(open_page: OpenPage) -> None:
    """Harvest is 20,000 tokens/s, times what the load leaves, times 0.5, 0.7 or 0.9."""
    page = open_page(grid(), "#load=1&slowdown=0")
    assert text_of(page, "slowdown-value") == "gentle"
    assert text_of(page, "load-value") == "10 chats a second on each replica"
    assert text_of(page, "tokens") == "5,000"
    page.locator("#slowdown").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#slowdown-value")).to_have_text("balanced")
    assert text_of(page, "tokens") == "7,000"
    assert text_of(page, "share") == "70 %"
    assert text_of(page, "saved") == "2.8"  # 8 replicas times 7,000 of 20,000
    assert text_of(page, "slower") == "1.25x"
    page.locator("#load").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#tokens")).to_have_text("12,600")
    row = page.locator("#chat-rows tr").filter(has_text="Between tokens, P99")
    assert row.locator("td").all_inner_texts() == ["50 ms", "62.5 ms", "1.25x"]
    spoken = "12,600 tokens/s, chat 1.25x, saves 5.04 GPUs"
    assert page.get_by_role("status").inner_text() == spoken


def test_machine_and_work_by_keyboard_and_the_link_keeps_them(open_page: OpenPage) -> None:
    page = open_page(grid())
    page.locator("#gpu").select_option("4 x H100")
    expect(page.locator("#model")).to_have_text("Llama-3.1-70B")
    assert text_of(page, "replicas-note") == "32 GPUs"
    page.get_by_label("Summaries").focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_label("Stories")).to_be_checked()
    page.locator("#replicas").focus()
    page.keyboard.press("Home")
    expect(page.locator("#replicas-value")).to_have_text("1 replica")
    again = open_page(grid(), page.url[page.url.index("#") :])
    assert again.locator("#model").input_value() == "2"
    assert text_of(again, "replicas-value") == "1 replica"
    expect(again.get_by_label("Stories")).to_be_checked()


@pytest.mark.parametrize("link", ["#machine=99&load=-1&work=none&replicas=0", "#load=x", "#%"])
def test_a_link_that_names_no_place_is_as_good_as_none(open_page: OpenPage, link: str) -> None:
    page = open_page(grid(), link)
    assert text_of(page, "replicas-value") == "8 replicas"
    assert text_of(page, "slowdown-value") == "balanced"


def test_a_point_of_a_chart_moves_its_slider(open_page: OpenPage) -> None:
    page = open_page(grid())
    page.locator("#settings-chart .dot").last.click()
    expect(page.locator("#slowdown-value")).to_have_text("greedy")
    expect(page.locator("#settings-chart .label.chosen")).to_have_text("greedy")
    chart = page.locator("#settings-chart svg")
    assert "At greedy: 9,000 tokens a second" in (chart.get_attribute("aria-label") or "")


def test_one_of_a_kind_has_no_slider(open_page: OpenPage) -> None:
    found = grid() | {"bursts": [1.0]}
    for machine in found["machines"]:
        machine["alone"] = machine["alone"][::2]
        for work in machine["work"].values():
            work["first_come"], work["beside"] = work["first_come"][::2], work["beside"][::2]
    page = open_page(found)
    expect(page.locator("#burst-field")).to_be_hidden()
    assert text_of(page, "tokens") == "7,000"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_bars_the_way(open_page: OpenPage, scheme: str, width: int) -> None:
    page = open_page(grid(), color_scheme=scheme, viewport={"width": width, "height": 900})
    check_nothing_bars_the_way(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_grid_without_a_figure_is_noticed(browser: Browser, tmp_path: Path) -> None:
    """The negative control of what every page of `open_page` is held to."""
    found = grid()
    del found["machines"][0]["alone"]
    (tmp_path / "plan.html").write_text(one_file(found))
    with browser.new_context() as context:
        page = context.new_page()
        with page.expect_event("pageerror", timeout=LIMIT_MS):
            page.goto((tmp_path / "plan.html").as_uri())


CUT_OFF = """
[...document.querySelectorAll("svg text")].filter((text) => {
  const [own, chart] = [text, text.closest("svg")].map((part) => part.getBoundingClientRect());
  return own.left < chart.left || own.right > chart.right;
}).map((text) => text.textContent)
"""


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_words_of_a_chart_are_cut_off(open_page: OpenPage, width: int) -> None:
    page = open_page(grid(), viewport={"width": width, "height": 900})
    expect(page.locator("#settings-chart text").first).to_be_visible()
    assert page.evaluate(CUT_OFF) == []
