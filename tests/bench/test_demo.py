"""The demo against a server that answers at once: what is sent, counted, written and drawn."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from conserve.bench.demo import texts as demo_texts
from conserve.bench.demo.client import DemoClient, DemoError, Sample, Seen, Summary
from conserve.bench.demo.conditions import Conditions
from conserve.bench.demo.figures import Period, Results, figures
from conserve.bench.demo.plan import DemoPlan
from conserve.bench.demo.results import table, write_results
from conserve.bench.demo.screen import Screen, rates, sparkline
from conserve.bench.scale import REFERENCE
from conserve.metrics.processors import Taken
from conserve.metrics.records import RequestRecord, read_records

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


PLAN = DemoPlan()
CONDITIONS = Conditions(PLAN, REFERENCE)
PAGES = demo_texts.documents(PLAN.num_documents, PLAN.page_words)
METRICS = """\
conserve:computed_tokens_total{class="online",engine="0"} 12.0
conserve:computed_tokens_total{class="offline",engine="0"} 340.0
conserve:output_tokens_total{class="offline",engine="0"} 9.0
"""


class Endpoint:
    """Answers chat with three tokens, two of them in one message."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = 0
        self.most_in_flight = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, text=METRICS)
        self.bodies.append(json.loads(request.content))
        if self.status != 200:
            return httpx.Response(self.status, text="no")
        return httpx.Response(200, content=self.events())

    async def events(self) -> AsyncIterator[bytes]:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0)
        for text, count in (("", 0), ("One ", 1), ("two three", 3)):
            choices = [{"delta": {"content": text}}]
            usage = {"prompt_tokens": 50, "completion_tokens": count}
            yield b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"
        self.in_flight -= 1


async def client_of(endpoint: Endpoint) -> tuple[DemoClient, Seen]:
    http = httpx.AsyncClient(transport=httpx.MockTransport(endpoint), base_url="http://test")
    seen = Seen()
    return DemoClient(http, "m", seen, PLAN), seen


async def test_every_document_is_summarised_as_a_flex_request() -> None:
    endpoint = Endpoint()
    client, seen = await client_of(endpoint)
    await client.summarise(PAGES)
    assert {summary.document for summary in seen.summaries} == {page.name for page in PAGES}
    assert {body["service_tier"] for body in endpoint.bodies} == {"flex"}
    assert {summary.summary for summary in seen.summaries} == {"One two three"}
    assert endpoint.most_in_flight == PLAN.in_flight


async def test_a_chat_is_online_and_each_token_has_a_time() -> None:
    endpoint = Endpoint()
    client, seen = await client_of(endpoint)
    await client.chat(iter(["why?"]), [0.0])
    assert "service_tier" not in endpoint.bodies[0]
    (record,) = seen.records
    assert (record.online, record.error, record.num_prompt_tokens) == (True, None, 50)
    assert len(record.token_times_s) == record.num_output_tokens == 3


async def test_a_failed_chat_is_recorded_and_a_failed_summary_ends_the_demo() -> None:
    client, seen = await client_of(Endpoint(status=500))
    await client.chat(iter(["why?"]), [0.0])
    assert seen.records[0].error == "HTTP 500: no"
    with pytest.raises(DemoError, match="HTTP 500"):
        await client.summarise(PAGES)
    with pytest.raises(DemoError, match="HTTP 500"):
        await client.warm_up(iter(["why?"]))


async def test_the_engines_counters_are_sampled_by_class() -> None:
    client, seen = await client_of(Endpoint())
    await client.sample_once()
    assert (seen.samples[0].online_tokens, seen.samples[0].offline_tokens) == (12.0, 340.0)


def record(online: bool, arrival_s: float, ttft_s: float, num_tokens: int) -> RequestRecord:
    first_s = arrival_s + ttft_s
    times = [first_s + 0.05 * i for i in range(num_tokens)]
    return RequestRecord("r", online, arrival_s, times, 100, num_tokens)


@pytest.fixture
def seen() -> Seen:
    """Ten seconds of chat, then ten of chat and one finished document."""
    return Seen(
        records=[
            record(True, 1.0, 0.2, 11),
            record(True, 11.0, 0.4, 11),
            record(False, 10.0, 3.0, 51),
        ],
        summaries=[Summary("while", "Loops.", 100, 51, 15.5)],
        samples=[Sample(float(t), 10.0 * t, max(0.0, 100.0 * (t - 10))) for t in range(21)],
    )


PERIODS = (Period("alone", 0.0, 10.0), Period("together", 10.0, 20.0))


def test_figures_count_what_came_within_the_period(seen: Seen) -> None:
    alone, together = (figures(seen, period) for period in PERIODS)
    assert (alone.num_chats, alone.num_summaries, alone.offline_tps) == (1, 0, 0.0)
    assert alone.chat_tps == pytest.approx((100 + 11) / 10)
    assert together.offline_tps == pytest.approx((100 + 51) / 10)
    assert together.total_tps == pytest.approx((111 + 151) / 10)
    assert (alone.ttft_p99_s, together.ttft_p50_s) == pytest.approx((0.2, 0.4))
    assert together.tbt_p50_s == pytest.approx(0.05)
    assert together.num_summaries == 1


def test_a_period_without_an_answer_says_why() -> None:
    failed = RequestRecord("r", True, 1.0, error="HTTP 500: no")
    with pytest.raises(DemoError, match="HTTP 500"):
        figures(Seen(records=[failed]), PERIODS[0])


@pytest.fixture
def results(seen: Seen, tmp_path: Path) -> Results:
    return write_results(tmp_path, seen, PERIODS, CONDITIONS)


def test_every_file_is_left(results: Results, seen: Seen, tmp_path: Path) -> None:
    (line,) = results.summaries.read_text().splitlines()
    assert json.loads(line)["summary"] == "Loops."
    kept = read_records(tmp_path / "requests.jsonl")
    assert [r.arrival_s for r in kept] == [r.arrival_s for r in seen.records]
    told = json.loads((tmp_path / "figures.json").read_text())
    assert told["together"]["num_summaries"] == 1
    assert (told["scale"], told["speed"]["prefill_tps"]) == (1.0, REFERENCE.prefill_tps)
    assert (told["targets"], told["disturbance"]) == ({"ttft_s": 1.0, "tbt_s": 0.2}, "")
    assert results.picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_needs_no_counters(seen: Seen, tmp_path: Path) -> None:
    seen.samples = [Sample(0.0, 0.0, 0.0), Sample(1.0, 0.0, 0.0)]
    assert write_results(tmp_path, seen, PERIODS, CONDITIONS).picture.is_file()


def test_the_table_holds_both_periods_and_the_ratio(results: Results) -> None:
    text = render(table(results))
    assert "alone" in text
    assert "together" in text
    assert "400 ms" in text
    assert "2.4 times the tokens" in text
    assert "scale 1: 2,400 prompt tokens a second" in " ".join(text.split())
    assert "isturbed" not in text


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        (
            replace(CONDITIONS, taken=(Taken(0.46), Taken(0.48, 0.04))),
            "Disturbed: other programs took 0% of the processors while the speed was measured, "
            "46% while chat was alone, 52% beside summaries.",
        ),
        (
            replace(CONDITIONS, measuring=Taken(0.5)),
            "Disturbed: other programs took 50% of the processors while the speed was measured, "
            "0% while chat was alone, 0% beside summaries.",
        ),
        (
            replace(CONDITIONS, taken=(Taken(0.01), Taken(0.02, 0.3))),
            "Disturbed: other guests of the host took 0% of the processors while the speed was "
            "measured, 1% while chat was alone, 32% beside summaries.",
        ),
        (
            replace(CONDITIONS, gflops=(210.0, 90.0)),
            "Disturbed: the machine itself computed 210 GFLOP/s before and 90 after.",
        ),
        (replace(CONDITIONS, taken=(Taken(0.04), Taken(0.03)), gflops=(200.0, 180.0)), ""),
    ],
)
def test_what_was_disturbed_is_said_beside_the_figures(
    conditions: Conditions, words: str, seen: Seen, tmp_path: Path
) -> None:
    results = write_results(tmp_path, seen, PERIODS, conditions)
    text = " ".join(render(table(results)).split())
    assert words in text
    assert ("Disturbed" in text) == bool(words)
    assert json.loads((tmp_path / "figures.json").read_text())["disturbance"] == words


def render(shown: Any) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


def test_the_screen_shows_progress_on_a_terminal_and_phases_elsewhere(seen: Seen) -> None:
    screen = Screen(seen, Console(width=100, force_terminal=True))
    screen.fit(CONDITIONS)
    screen.phase("chat alone", 0.0, 10.0)
    assert "1 of 79" in render(screen._picture(5.0))
    console = Console(width=100, force_terminal=False)
    with console.capture() as captured:
        Screen(seen, console).phase("warming up")
        Screen(seen, console).fit(CONDITIONS)
    phase, scale, fitting = captured.get().splitlines()
    assert phase == "demo: warming up"
    assert scale.startswith("demo: scale 1: 2,400 prompt tokens a second")
    assert "bursts of 6 chats, 100 words in and 40 tokens out; targets 1,000 ms" in fitting


def test_rates_are_differences_a_second() -> None:
    samples = [Sample(0.0, 0.0, 0.0), Sample(2.0, 10.0, 40.0)]
    assert rates(samples) == ([5.0], [20.0])
    assert rates(samples[:1]) == ([], [])


def test_a_sparkline_is_a_share_of_its_top() -> None:
    assert sparkline([0, 5, 10, 20], 10) == " ▄██"
    assert sparkline([0.0], 0.0) == " "


def test_chat_comes_in_bursts_within_its_span() -> None:
    arrivals = PLAN.arrivals_s()
    assert len(arrivals) == PLAN.num_chats == 42
    assert 0 <= arrivals[0] <= arrivals[-1] < PLAN.alone_s
    assert arrivals == DemoPlan().arrivals_s()


def test_documents_are_cut_and_questions_differ() -> None:
    assert len(PAGES) == PLAN.num_documents
    assert max(len(page.text.split()) for page in PAGES) <= PLAN.page_words
    prompts = demo_texts.chat_prompts(1, 20)
    asked = {next(prompts) for _ in range(50)}
    assert len(asked) == 50
    assert max(len(question.split()) for question in asked) < 50


def test_where_there_is_more_time_than_pages_others_read_them_too() -> None:
    many = demo_texts.documents(300, 50)
    assert len(many) == 300
    beginnings = {demo_texts.summary_prompt(page)[:40] for page in many}
    assert len(beginnings) == max(page.reader for page in many) > 3
