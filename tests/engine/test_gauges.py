"""Whose blocks are whose, on vLLM's own block pool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine.gauges import BLOCKS_EVERY_S, Gauges
from conserve.engine.stats import EngineStats
from tests.engine.device import Device
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

NUM_BLOCKS = 64
SHARED = list(range(1, 17))  # four blocks


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    scheduler = make_scheduler(tmp_path, num_blocks=NUM_BLOCKS)
    yield Engine(scheduler, Device(BLOCK_SIZE))
    scheduler.shutdown()


def look(engine: Engine) -> dict[str, Any]:
    """Blocks of online and offline requests, and free ones, as a first look finds them."""
    stats = EngineStats()
    Gauges(engine.scheduler, engine.scheduler.promises, stats).look(0.0)
    return {**stats.data["kv_blocks"], "free": stats.data["kv_free_blocks"][""]}


def test_a_block_that_both_classes_hold_is_an_online_one(engine: Engine) -> None:
    assert look(engine) == {"online": 0, "offline": 0, "free": NUM_BLOCKS - 1}
    engine.add(make_request("off", [*SHARED, 50, 51, 52], 30, online=False, arrival_s=0.0))
    engine.step()
    assert look(engine) == {"online": 0, "offline": 5, "free": NUM_BLOCKS - 6}
    for name in ("on", "on too"):  # both begin as the offline one does
        engine.add(make_request(name, [*SHARED, 60, 61], 30, online=True, arrival_s=0.0))
        engine.step()
    found = look(engine)
    assert found["online"] == 4 + 1 + 1, "the shared four count once"
    assert sum(found.values()) == NUM_BLOCKS - 1
    assert found["offline"] >= 1
    engine.run()
    assert look(engine) == {"online": 0, "offline": 0, "free": NUM_BLOCKS - 1}


def test_it_looks_now_and_then_and_once_more_when_all_is_done(engine: Engine) -> None:
    engine.add(make_request("on", SHARED, 8, online=True, arrival_s=0.0))
    engine.step()
    scheduler, stats = engine.scheduler, EngineStats()
    gauges = Gauges(scheduler, scheduler.promises, stats)
    for now_s, looks in ((0.0, True), (BLOCKS_EVERY_S / 2, False), (BLOCKS_EVERY_S, True)):
        gauges.look(now_s)
        assert stats.data["running_requests"] == {"online": 1, "offline": 0}
        assert ("kv_blocks" in stats.data) == looks
        assert stats.data.get("ttft_target_seconds", {}).get("") == (1.0 if looks else None)
        stats.reset()
    scheduler.running = []
    gauges.look(BLOCKS_EVERY_S * 1.1)
    assert stats.data["kv_blocks"] == {"online": 0, "offline": 4}, "what nobody runs is not online"


def test_requests_are_counted_as_they_come(engine: Engine) -> None:
    for name, online in (("a", True), ("b", False), ("c", False)):
        engine.add(make_request(name, SHARED, 2, online=online, arrival_s=0.0))
    assert engine.scheduler.stats.data["requests"] == {"online": 1.0, "offline": 2.0}
