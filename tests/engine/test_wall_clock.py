"""The wall clock may be set at any moment: nothing that the engine measures notices."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine.arrival import arrived_s
from conserve.engine.plugin import _watched
from conserve.engine.scheduler import ConserveScheduler
from conserve.engine.stats import EngineStats
from tests.engine.device import Device
from tests.engine.engine import BLOCK_SIZE, Engine, FakeClock, make_request, make_scheduler

pytestmark = pytest.mark.engine

WALL_S = 1.8e9


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    scheduler = make_scheduler(tmp_path)
    type(scheduler).wall_clock = FakeClock(WALL_S)
    yield Engine(scheduler, Device(BLOCK_SIZE))
    scheduler.shutdown()


def figures(engine: Engine) -> dict[str, list[float]]:
    """Serve one request that came 0.2 s ago, while the wall clock is set back at every look."""
    scheduler, seen = engine.scheduler, dict[str, list[float]]()
    handed: list[EngineStats] = []
    scheduler.driver.stats.take = lambda: handed.append(EngineStats(data=scheduler.stats.data))
    request = make_request("on", [1, 2, 3], 4, online=True, arrival_s=WALL_S - 0.2)
    engine.add(request)
    while scheduler.has_unfinished_requests():
        scheduler.wall_clock.now_s -= 3600
        engine.step()
    for stats in handed:
        for name, _, value in stats.items():
            seen.setdefault(name, []).extend(value if isinstance(value, list) else [value])
    return seen


def test_no_figure_goes_back_with_the_wall_clock(engine: Engine) -> None:
    seen = figures(engine)
    assert seen["ttft_seconds"][0] == pytest.approx(0.2 + engine.step_s)
    assert all(value >= 0 for values in seen.values() for value in values), seen
    assert "decision_seconds" in seen


def test_by_default_durations_are_measured_with_a_clock_that_goes_forward() -> None:
    assert ConserveScheduler.clock is time.monotonic


@pytest.mark.parametrize(
    ("stamp_s", "wall_s", "right_s"),
    [
        pytest.param(WALL_S - 2, WALL_S, 48.0, id="two seconds ago"),
        pytest.param(WALL_S, WALL_S - 3600, 50.0, id="set back since: not in the future"),
    ],
)
def test_an_arrival_is_told_on_the_engines_clock(
    stamp_s: float, wall_s: float, right_s: float
) -> None:
    request: Any = SimpleNamespace(arrival_time=stamp_s)
    assert arrived_s(request, now_s=50.0, wall_s=wall_s) == right_s


def test_the_monitor_hears_of_arrivals_on_the_same_clock(engine: Engine) -> None:
    heard: list[tuple[str, float, int, float | None]] = []
    engine.scheduler.monitor.arrived = lambda *told: heard.append(told)
    request = make_request("on", [1, 2, 3], 4, online=True, arrival_s=WALL_S - 0.5)
    core = SimpleNamespace(scheduler=engine.scheduler)
    _watched(lambda _, request: (request, 0))(core, request)
    ((name, at_s, num_tokens, target_s),) = heard
    assert (name, num_tokens, target_s) == ("on", 3, None)
    assert at_s == pytest.approx(engine.scheduler.clock() - 0.5)
