"""The line a minute: what it says, when it says nothing, and who may write into vLLM's log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from conserve.batch.lifecycle import Status
from conserve.batch.overview import Overview
from conserve.engine.connector import ConserveConnector
from conserve.engine.stats import EngineStats
from conserve.server.batches.metrics import BatchMetrics
from conserve.server.logs import minute
from conserve.server.logs.middleware import LogsMiddleware, join_vllms_log
from conserve.server.logs.minute import is_idle, log_each, minute_of, words
from conserve.server.series import Change, Reading, change, read
from tests.server.vllms_app import Engine, engine_config, started, vllms_app

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

NO_BATCHES = Overview({}, {}, 0, 0, 0, 0, 0, 0, 0, 0.0, None, None)
TWO_BATCHES = Overview(
    statuses={Status.IN_PROGRESS: 2, Status.COMPLETED: 5},
    deadlines={"on_track": 1, "will_miss": 1},
    completed=700,
    failed=30,
    input_tokens=1,
    output_tokens=1,
    live_completed=600,
    live_failed=30,
    live_remaining=370,
    remaining_tokens=1e5,
    harvest_tokens_per_s=500.0,
    finish_s=200.0,
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Exported:
    """What two engines and a store export, by their own exporters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def into(kind: type) -> Any:
            return lambda **options: kind(registry=self.registry, **options)

        self._engines = ConserveConnector.build_prom_metrics(
            SimpleNamespace(
                kv_transfer_config=None,
                additional_config={"conserve": {"slo_ttft_s": 1.0, "slo_tbt_s": 0.2}},
            ),
            {kind: into(kind) for kind in (Counter, Gauge, Histogram)},
            ["model_name", "engine"],
            {0: ["m", "0"], 1: ["m", "1"]},
        )
        self._batches = BatchMetrics(self.registry)
        self._batches.set(NO_BATCHES)

    def engine(self, number: int, **figures: dict[str, Any]) -> None:
        self._engines.observe(EngineStats(data=figures).to_dict(), number)

    def store(self, seen: Overview) -> None:
        self._batches.set(seen)


def busy(exported: Exported) -> None:
    online = {"online": [0.15] * 49 + [0.9]}
    for number in (0, 1):
        exported.engine(
            number,
            ttft_seconds=online | {"offline": [20.0] * 50},
            tbt_seconds={"online": [0.04] * 100},
            computed_tokens={"online": 500, "offline": 3000},
            running_requests={"online": 0, "offline": 4},
            waiting_requests={"online": 0, "offline": 10},
            stopped_steps={"": 2},
            displaced_requests={"": 1},
        )
    exported.store(TWO_BATCHES)


def minute_since(before: Reading, exported: Exported) -> Change:
    return change(before, read(exported.registry, before.time_s + 60.0))


def test_it_says_what_matters() -> None:
    exported = Exported()
    before = read(exported.registry, 0.0)
    busy(exported)
    found = minute_of(minute_since(before, exported))
    assert found.online_first_tokens == 100
    assert found.ttft_p50_s is not None
    assert 0.1 < found.ttft_p50_s <= 0.15
    assert found.ttft_p99_s is not None
    assert 0.75 < found.ttft_p99_s <= 1.0
    assert (found.ttft_target_s, found.tbt_target_s) == (1.0, 0.2)
    assert found.offline_tokens_per_s == 100
    assert (found.stopped_steps, found.displaced_requests) == (4, 2)
    assert (found.batch_lines_done, found.batch_lines) == (630, 1000)
    line = words(found)
    assert line.startswith("Last 60 s: online: 100 requests, first token P50 ")
    assert "(target 1000)" in line
    assert "; offline: 100 tokens/s, 8 running, 20 waiting; " in line
    assert "; 4 steps stopped, 2 requests displaced; " in line
    assert line.endswith("batches: 2 live, 630 of 1000 lines, 1 will miss the deadline")
    json.dumps(asdict(found), allow_nan=False)


def test_it_tells_of_its_own_minute_only() -> None:
    exported = Exported()
    busy(exported)
    before = read(exported.registry, 0.0)
    exported.engine(0, computed_tokens={"offline": 60.0})
    found = minute_of(minute_since(before, exported))
    assert found.online_first_tokens == 0
    assert found.ttft_p99_s is None
    assert found.offline_tokens_per_s == 1
    assert "online" not in words(found)
    assert "stopped" not in words(found)


@pytest.mark.parametrize(
    ("work", "idle"),
    [
        ({}, True),
        ({"step_seconds": {"": [0.1]}}, True),
        ({"computed_tokens": {"online": 1.0}}, False),
        ({"waiting_requests": {"offline": 1}}, False),
        ({"running_requests": {"online": 1}}, False),
    ],
)
def test_it_is_idle_when_nothing_runs_or_waits(work: dict[str, Any], idle: bool) -> None:
    exported = Exported()
    before = read(exported.registry, 0.0)
    exported.engine(1, **work)
    assert is_idle(minute_since(before, exported)) == idle


def test_a_batch_that_waits_is_no_idleness() -> None:
    exported = Exported()
    exported.store(TWO_BATCHES)
    before = read(exported.registry, 0.0)
    assert not is_idle(minute_since(before, exported))
    exported.store(NO_BATCHES)
    assert is_idle(minute_since(before, exported))


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """What vLLM's handlers get. vLLM's loggers do not propagate, so that caplog sees nothing."""
    seen: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    vllms, ours = logging.getLogger("vllm"), logging.getLogger("conserve")
    kept = vllms.handlers, vllms.level, ours.handlers, ours.level, ours.propagate
    vllms.handlers = [Keep()]
    vllms.setLevel(logging.INFO)
    yield seen
    vllms.handlers, vllms.level, ours.handlers, ours.level, ours.propagate = kept
    logging.getLogger("vllm").manager._clear_cache()  # type: ignore[attr-defined]


async def test_it_is_logged_once_an_interval(lines: list[logging.LogRecord]) -> None:
    exported = Exported()
    task = asyncio.create_task(log_each(0.01, exported.registry))
    await asyncio.sleep(0.05)
    assert not lines, "an idle server says nothing"
    exported.engine(0, waiting_requests={"offline": 3})
    async with asyncio.timeout(30):
        while len(lines) < 2:  # noqa: ASYNC110  (a log has no event)
            await asyncio.sleep(0.01)
    task.cancel()
    assert all("3 waiting" in record.getMessage() for record in lines)
    assert lines[0].name == "vllm.conserve"
    assert lines[0].conserve["offline_waiting"] == 3  # type: ignore[attr-defined]


async def test_it_goes_on_after_looks_that_failed(
    lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so once: a file of another process's figures may be cut off."""
    exported = Exported()
    exported.engine(0, waiting_requests={"offline": 3})
    looks = iter((None, ValueError("cut off"), ValueError("cut off")))

    def look(*arguments: Any) -> Reading:
        if error := next(looks, None):
            raise error
        return read(*arguments)

    monkeypatch.setattr(minute, "read", look)
    task = asyncio.create_task(log_each(0.01, exported.registry))
    async with asyncio.timeout(30):
        while len(lines) < 2:  # noqa: ASYNC110  (a log has no event)
            await asyncio.sleep(0.01)
    task.cancel()
    assert [record.levelname for record in lines[:2]] == ["ERROR", "INFO"]


def test_our_rooms_write_into_vllms_log(lines: list[logging.LogRecord]) -> None:
    ours = logging.getLogger("conserve")
    ours.handlers = []
    for _ in range(2):
        join_vllms_log()
    logging.getLogger("conserve.batch.worker").warning("%s is late", "batch_1-2")
    assert [record.getMessage() for record in lines] == ["batch_1-2 is late"]


@pytest.mark.parametrize(
    ("interval_s", "rank", "no_stats", "writes"),
    [
        (60.0, 0, False, True),
        (None, 0, False, True),
        (0.0, 0, False, False),
        (60.0, 1, False, False),
        (60.0, 0, True, False),
    ],
)
async def test_the_first_api_process_writes_while_the_app_runs(
    interval_s: float | None, rank: int, no_stats: bool, writes: bool
) -> None:
    def tasks() -> list[asyncio.Task[Any]]:
        return [task for task in asyncio.all_tasks() if task.get_name() == "conserve-log"]

    given: dict[str, Any] = {} if interval_s is None else {"log_interval_s": interval_s}
    given["disable_log_stats"] = no_stats
    app = vllms_app(Engine(engine_config(_api_process_rank=rank)), **given)
    app.add_middleware(LogsMiddleware)
    async with started(app):
        assert bool(tasks()) == writes
    assert not tasks()
