"""From the engine's series to what the page says, second by second, on a clock of the test's."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conserve.server.dashboard.collector import Collector
from conserve.server.dashboard.history import COARSE_POINTS, FINE_POINTS, History
from conserve.server.dashboard.messages import Point, Starving
from conserve.server.dashboard.status import Status
from conserve.server.series import Change, change, merge, read
from tests.server.dashboard_world import Series, said

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def series() -> Series:
    return Series()


def newest(collector: Collector) -> Point:
    return collector.history.fine[-1]


async def test_a_point_has_the_rates_of_its_second(series: Series) -> None:
    collector = series.collector()
    series.count("computed_tokens", 500, "online")
    await collector.look()
    series.count("computed_tokens", 80, "online")
    series.count("computed_tokens", 1200, "offline")  # a series that was not there before
    series.count("requests", 6, "online")
    await series.after(collector, 2.0)
    point = newest(collector)
    assert point.time_s == series.now_s
    assert (point.online_tps, point.offline_tps) == (40.0, 600.0)
    assert point.online_rps == 3.0
    assert point.ttft_p99_s is None
    assert point.checkpoint_used_ratio is None


async def test_engines_add_up_and_the_worst_model_is_told(series: Series) -> None:
    for engine in ("0", "1"):
        series.count("computed_tokens", 10, "offline", engine)
        series.gauge("kv_free_blocks", 100, engine=engine)
    series.gauge("latency_model_error_ratio", 0.02, engine="0")
    series.gauge("latency_model_error_ratio", 0.3, engine="1")
    collector = series.collector()
    await collector.look()
    assert said(collector).harvest.offline_tokens == 20
    assert said(collector).memory.free_blocks == 200
    assert said(collector).latency_model_error == 0.3


async def test_what_chats_found_is_of_those_that_first_ran_in_the_last_minute(
    series: Series,
) -> None:
    series.gauge("history_blocks", 20)
    series.count("prompt_tokens", 1000, "online")
    collector = series.collector()
    await collector.look()
    assert said(collector).memory.found_ratio is None
    series.count("prompt_tokens", 100, "online")
    series.count("prefix_hit_tokens", 80, "online")
    series.count("prompt_tokens", 500, "offline")
    await series.after(collector, 2.0)
    assert said(collector).memory.found_ratio == 0.8
    assert said(collector).memory.history_blocks == 20
    await series.after(collector, 70.0)
    assert said(collector).memory.found_ratio is None


async def test_latencies_are_those_of_the_last_ten_seconds(series: Series) -> None:
    series.observe("ttft_seconds", 0.05)
    collector = series.collector()
    await collector.look()
    series.observe("ttft_seconds", 0.15, 0.15, 0.15)
    series.observe("ttft_seconds", 1.5, 1.5, label="offline")  # nobody waits for these
    await series.after(collector)
    assert newest(collector).ttft_p50_s == pytest.approx(0.15)
    for _ in range(9):
        await series.after(collector)
    assert newest(collector).ttft_p50_s == pytest.approx(0.15)
    await series.after(collector)
    assert newest(collector).ttft_p50_s is None


@pytest.mark.parametrize(
    ("first_token_s", "gap_s", "state", "words"),
    [
        (0.3, 0.15, "safe", "Chat is safe"),
        (1.6, 0.15, "late", "first tokens is over"),
        (0.3, 0.4, "late", "gaps between tokens is over"),
        (1.6, 0.4, "late", "first tokens and gaps between tokens"),
    ],
)
async def test_the_verdict_on_chat(
    series: Series, first_token_s: float, gap_s: float, state: str, words: str
) -> None:
    collector = series.collector()
    await collector.look()
    series.observe("ttft_seconds", first_token_s)
    series.observe("tbt_seconds", gap_s, gap_s)
    await series.after(collector)
    chat = said(collector).chat
    assert chat.state == state
    assert words in chat.text + chat.detail
    assert chat.ttft_within == float(first_token_s <= 1.0)
    assert chat.tbt_within == float(gap_s <= 0.2)
    assert (chat.num_ttft, chat.num_tbt) == (1, 2)


async def test_a_minute_later_there_is_no_chat(series: Series) -> None:
    collector = series.collector()
    await collector.look()
    series.observe("ttft_seconds", 1.6)
    await series.after(collector)
    for _ in range(60):
        await series.after(collector)
    assert said(collector).chat.state == "quiet"
    assert said(collector).chat.ttft_p99_s is None


async def test_what_the_server_does(series: Series) -> None:
    status = Status()
    collector = series.collector(status=status)
    await collector.look()
    assert said(collector).server.state == "ready"
    series.count("requests", 1, "offline")
    series.gauge("running_requests", 1, "offline")
    await series.after(collector)
    assert said(collector).server.state == "serving"
    series.gauge("running_requests", 0, "offline")
    for _ in range(11):
        await series.after(collector)
    assert said(collector).server.state == "idle"
    status.draining = True
    await series.after(collector)
    assert said(collector).server.state == "draining"
    status.engine_dead = lambda: True
    await series.after(collector)
    assert said(collector).server.state == "down"


def texts(collector: Collector) -> list[str]:
    return [event.text for event in collector.events.newest()]


async def test_a_displacement_in_words(series: Series) -> None:
    collector = series.collector()
    await collector.look()
    series.count("requests", 4, "online")
    await series.after(collector)
    series.count("requests", 2, "online")
    series.count("displaced_requests", 2)
    series.count("displaced_tokens", 900)
    series.count("displaced_covered_tokens", 900)
    await series.after(collector)
    series.count("displaced_requests", 1)
    await series.after(collector)
    assert texts(collector) == [
        "Displaced 3 offline requests for a burst of 6: 0 tokens to compute again."
    ]
    for _ in range(5):
        await series.after(collector)
    series.count("requests", 1, "online")
    series.count("stopped_steps", 1)
    series.count("dropped_tokens", 1200)
    await series.after(collector)
    assert texts(collector)[0] == (
        "Stopped 1 step half-way for 1 arrival: 1,200 tokens to compute again."
    )
    assert len(texts(collector)) == 2


async def test_what_goes_on_for_long_is_told_on(series: Series) -> None:
    """A busy server gives way and restores every second: what it did first leaves the list."""
    collector = series.collector()
    await collector.look()
    for _ in range(300):
        series.count("requests", 1, "online")
        series.count("stopped_steps", 1)
        series.count("dropped_tokens", 10)
        series.count("restored_tokens", 10)
        await series.after(collector)
    events = collector.events.newest()
    for kind in ("yield", "restore"):
        assert [event.time_s - series.now_s for event in events if event.kind == kind] == [
            -59.0, -119.0, -179.0, -239.0, -299.0,
        ]  # fmt: skip
    assert {event.text for event in events} == {
        "Stopped 60 steps half-way for a burst of 60: 600 tokens to compute again.",
        "Restored 600 tokens of displaced requests from checkpoints.",
    }


async def test_late_chat_is_an_event_once(series: Series) -> None:
    collector = series.collector()
    await collector.look()
    series.observe("ttft_seconds", 1.6)
    for _ in range(3):
        await series.after(collector)
    (text,) = texts(collector)
    assert text.startswith("P99 of first tokens went over 1 s:")
    for _ in range(60):
        await series.after(collector)
    series.observe("ttft_seconds", 0.05)
    await series.after(collector)
    assert texts(collector)[0] == "Chat is within its targets again."


async def test_checkpoints_show_where_the_server_keeps_some(series: Series) -> None:
    collector = series.collector()
    await collector.look()
    assert said(collector).yields.restored_tokens is None
    series.tier("checkpoint_used_ratio", 0.25)
    for _ in range(2):
        series.count("restored_tokens", 600)
        await series.after(collector)
    assert said(collector).yields.restored_tokens == 1200
    assert said(collector).memory.checkpoint_used_ratio == 0.25
    assert newest(collector).checkpoint_used_ratio == 0.25
    assert texts(collector) == ["Restored 1,200 tokens of displaced requests from checkpoints."]


def a_change(time_s: float, tokens: float = 0.0) -> Change:
    totals = {("computed_tokens_total", "offline"): tokens}
    return Change(time_s, 1.0, totals, {("kv_free_blocks", ""): 5.0}, {})


def test_an_hour_and_more_is_kept_in_bounded_memory() -> None:
    history = History()
    for second in range(3 * 3600):
        history.add(a_change(float(second), tokens=second % 20))
    assert len(history.fine) == FINE_POINTS
    assert len(history.coarse) == COARSE_POINTS
    assert history.coarse[-1].time_s - history.coarse[0].time_s >= 3600
    assert len(history.recent()) == 60
    assert {point.offline_tps for point in history.coarse} == {4.5, 14.5}


def test_a_series_that_fell_counts_as_nothing(series: Series) -> None:
    series.count("stopped_steps", 5)
    series.observe("ttft_seconds", 0.3)
    before = read(series.registry, 1.0)
    fallen = change(before, read(Series().registry, 2.0))
    assert fallen.total("stopped_steps_total") == 0
    assert fallen.latencies == {}
    assert change(read(Series().registry, 0.0), before).total("stopped_steps_total") == 5


def test_merging_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([])


async def test_a_look_that_fails_is_survived(
    series: Series, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conserve.server.dashboard.collector.EVERY_S", 0.0)
    collector = series.collector()
    looks = iter((RuntimeError("gone"), RuntimeError("gone"), None))

    async def look() -> float:
        if error := next(looks, None):
            raise error
        await Collector.look(collector)
        raise asyncio.CancelledError

    collector.look = look  # type: ignore[method-assign]
    with pytest.raises(asyncio.CancelledError):
        await collector.run()
    assert caplog.text.count("look at the figures failed") == 1
    assert collector.num_looks == 1


WRITE = """
from prometheus_client import Counter, Gauge, Histogram
labels = ["model_name", "engine", "class"]
Counter("conserve:requests", "-", labels).labels("m", "0", "online").inc(3)
ttft = Histogram("conserve:ttft_seconds", "-", labels, buckets=(1.0,))
ttft.labels("m", "0", "online").observe(2)
mode = {"multiprocess_mode": "mostrecent"}
Gauge("conserve:kv_free_blocks", "-", labels[:2], **mode).labels("m", "0").set(7)
Counter("vllm:other", "-").inc()
"""
READ = """
from prometheus_client import CollectorRegistry, multiprocess
from conserve.server.series import narrowed, read
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
reading = read(narrowed(registry), 1.0)
print(sorted(reading.values.items()), reading.buckets)
"""


def test_several_api_processes_add_up(tmp_path: Path) -> None:
    """They share their series through files; each reads what all of them wrote."""

    def run(code: str) -> str:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout

    run(WRITE)
    run(WRITE)
    values = [(("kv_free_blocks", ""), 7.0), (("requests_total", "online"), 6.0)]
    assert run(READ).strip() == f"{values} {{'ttft_seconds': {{1.0: 0.0, inf: 2.0}}}}"


async def test_where_the_server_stands_is_of_the_last_minute(series: Series) -> None:
    collector = series.collector()
    await collector.look()
    assert said(collector).standing.text == ""
    series.count("chat_seconds", 60)
    series.count("chat_alone_seconds", 50)
    await series.after(collector)
    assert said(collector).standing.text == "chat 1.2x of alone"
    series.count("bound_tokens", 1000)
    series.count("computed_tokens", 950, "offline")
    series.count("recomputed_tokens", 40, "offline")
    await series.after(collector)
    standing = said(collector).standing
    assert standing.text == (
        "chat 1.2x of alone, harvest 91 % of what first come first served would do"
    )
    assert (standing.chat_slowdown, standing.harvest_share) == (1.2, 0.91)
    await series.after(collector, 70.0)
    assert said(collector).standing.text == ""


async def test_offline_work_that_starves_is_told(series: Series) -> None:
    collector = series.collector()
    await collector.look()
    assert said(collector).starving == Starving("", None, None)
    series.gauge("oldest_offline_wait_seconds", 1700, engine="0")
    series.gauge("oldest_offline_wait_seconds", 3, engine="1")
    await series.after(collector)
    assert said(collector).starving == Starving("", 1700, None), "the longest, not the sum"
    series.gauge("oldest_offline_wait_seconds", 1860, engine="0")
    await series.after(collector)
    told = said(collector).starving.text
    assert told == "Offline work starves: a request has been without a token for 31 min."
