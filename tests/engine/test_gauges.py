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


def gauges_of(engine: Engine, stats: EngineStats) -> Gauges:
    scheduler = engine.scheduler
    return Gauges(scheduler, scheduler.promises, scheduler.driver.tracker, stats)


def look(engine: Engine) -> dict[str, Any]:
    """Blocks of online and offline requests, and free ones, as a first look finds them."""
    stats = EngineStats()
    gauges_of(engine, stats).look(0.0)
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
    gauges = gauges_of(engine, stats)
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


def oldest_wait_s(engine: Engine, now_s: float) -> float:
    stats = EngineStats()
    gauges_of(engine, stats).look(now_s)
    return float(stats.data["oldest_offline_wait_seconds"][""])


def test_the_longest_wait_is_since_the_last_token_or_the_arrival(engine: Engine) -> None:
    clock = engine.scheduler.clock
    came_s = clock()
    assert oldest_wait_s(engine, came_s + 9) == 0, "nobody waits"
    engine.add(make_request("on", SHARED, 30, online=True, arrival_s=came_s - 500))
    engine.add(make_request("runs", [70, 71], 30, online=False, arrival_s=came_s - 40))
    engine.step()
    engine.step()
    token_s = engine.scheduler.driver.tracker.get("runs").last_token_s
    assert token_s is not None
    now_s = clock() + 7
    assert oldest_wait_s(engine, now_s) == pytest.approx(now_s - token_s)
    # Whoever came first of the least urgent has waited longest, behind others of its class.
    for name, priority, waited_s in (("urgent", 1, 20), ("later", 9, 30), ("last", 9, 25)):
        request = make_request(name, SHARED, 2, online=False, arrival_s=now_s - waited_s)
        request.priority = priority
        engine.add(request)
    assert oldest_wait_s(engine, now_s) == pytest.approx(30)


def test_one_that_was_displaced_does_not_hide_who_waits_behind_it(engine: Engine) -> None:
    scheduler, now_s = engine.scheduler, engine.scheduler.clock()
    engine.add(make_request("first", [70, 71], 30, online=False, arrival_s=now_s - 40))
    engine.step()
    engine.step()
    scheduler._preempt_request(scheduler.running.pop(), now_s)
    engine.add(make_request("second", SHARED, 2, online=False, arrival_s=now_s - 15))
    assert [r.request_id for r in scheduler.waiting.offline_oldest()] == ["first", "second"]
    assert oldest_wait_s(engine, now_s) == pytest.approx(15)


def counted(engine: Engine) -> dict[str, float]:
    """What is counted from here on, as it is handed over."""
    totals: dict[str, float] = {}
    connector = engine.scheduler.connector
    hand_over = connector.get_kv_connector_stats

    def keep() -> Any:
        stats = hand_over()
        for name, _, value in stats.items() if stats else ():
            if isinstance(value, float | int):
                totals[name] = totals.get(name, 0.0) + value
        return stats

    connector.get_kv_connector_stats = keep
    return totals


def test_where_the_engine_stands_is_counted(engine: Engine) -> None:
    totals = counted(engine)
    engine.add(make_request("on", SHARED, 8, online=True, arrival_s=0.0))
    engine.run()
    assert totals["chat_seconds"] == pytest.approx(totals["chat_alone_seconds"])
    assert totals["chat_seconds"] == pytest.approx(7 * engine.step_s), "each gap is a step"
    assert totals["bound_tokens"] == 0
    engine.add(make_request("off", [60, 61, 62, 63, *SHARED], 20, online=False, arrival_s=0.0))
    engine.add(make_request("again", SHARED, 8, online=True, arrival_s=0.0))
    engine.run()
    assert totals["chat_seconds"] == pytest.approx(14 * engine.step_s)
    assert totals["chat_seconds"] > 1.2 * totals["chat_alone_seconds"]
    assert totals["bound_tokens"] > 0
