"""The real scheduler under our policy, on a device that sees every stale read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine import stopped
from conserve.engine import stopper as stopper_module
from conserve.engine.settings import EngineSettings
from conserve.engine.stats import EngineStats
from tests.engine.device import VOCABULARY, Device, StaleReadError, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make(depth: int = 1, **options: Any) -> Engine:
        scheduler = make_scheduler(tmp_path, async_scheduling=depth > 1, **options)
        made.append(scheduler)
        return Engine(scheduler, Device(BLOCK_SIZE), depth=depth)

    yield make
    for scheduler in made:
        scheduler.shutdown()


def prompts(seed: int, count: int, shared: int = 0) -> list[list[int]]:
    """Random prompts of 3 to 40 tokens, the first `shared` of them the same in all."""
    chance = random.Random(seed)
    head = [chance.randrange(1, VOCABULARY) for _ in range(shared)]
    return [
        head + [chance.randrange(1, VOCABULARY) for _ in range(chance.randrange(3, 40))]
        for _ in range(count)
    ]


def run_mixed(engine: Engine, seed: int, *, num_offline: int = 40, shared: int = 0) -> None:
    """Offline requests queued from the start, online ones coming at random; then check them all."""
    chance = random.Random(seed)
    wanted = {}
    for i, prompt in enumerate(prompts(seed, num_offline, shared)):
        name, length = f"off{i}", chance.randrange(1, 12)
        engine.add(make_request(name, prompt, length, online=False, arrival_s=i * 0.001))
        wanted[name] = expected_output(prompt, length)
    for i, prompt in enumerate(prompts(seed + 1, 12, shared)):
        for _ in range(chance.randrange(8)):
            engine.step()
        name, length = f"on{i}", chance.randrange(1, 8)
        arrival_s = engine.scheduler.clock.now_s
        engine.scheduler.monitor.arrived(name, arrival_s, len(prompt))
        engine.add(make_request(name, prompt, length, online=True, arrival_s=arrival_s))
        wanted[name] = expected_output(prompt, length)
    engine.run()
    assert engine.outputs == wanted
    assert engine.finished == set(wanted)


def assert_nothing_left(engine: Engine) -> None:
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is the null block
    assert not engine.scheduler.running
    assert len(engine.scheduler.waiting) == 0
    assert not engine.scheduler.driver.steps


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("num_blocks", [24, 256], ids=["scarce", "ample"])
@pytest.mark.parametrize("seed", range(4))
def test_every_output_is_what_the_request_gets_alone(
    make_engine: MakeEngine, depth: int, num_blocks: int, seed: int
) -> None:
    engine = make_engine(depth, num_blocks=num_blocks)
    run_mixed(engine, seed)
    assert_nothing_left(engine)


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("shared", [0, 13], ids=["distinct", "shared-prefix"])
@pytest.mark.parametrize("seed", range(6))
def test_random_stops_leave_no_trace(
    make_engine: MakeEngine, depth: int, shared: int, seed: int
) -> None:
    engine = make_engine(depth, num_blocks=48)
    chance = random.Random(seed)
    engine.stop = lambda step: chance.random() < 0.5
    run_mixed(engine, seed, shared=shared)
    assert engine.num_stops > 5
    assert_nothing_left(engine)


def test_tokens_add_up(make_engine: MakeEngine) -> None:
    """P7: what ran is what was computed; recomputed and dropped are told apart."""
    engine = make_engine(num_blocks=24)
    chance = random.Random(5)
    engine.stop = lambda step: chance.random() < 0.3
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
    run_mixed(engine, 5)
    keep()
    assert totals["computed_tokens"] == engine.device.num_tokens_run
    lengths = sum(len(row) for row in engine.outputs.values())
    assert totals["output_tokens"] == lengths
    assert totals["stopped_steps"] == engine.num_stops
    assert totals["dropped_tokens"] > 0
    assert totals["recomputed_tokens"] < totals["computed_tokens"]


def forget_prefix_cache(scheduler: Any, scheduled: dict[str, int], before: Any) -> list[str]:
    """Careless: leaves half-written blocks in the prefix cache."""
    real = stopped._uncache
    try:
        stopped._uncache = lambda kv_cache_manager, request: set()
        return stopped.roll_back(scheduler, scheduled, before)
    finally:
        stopped._uncache = real


def forget_counters(scheduler: Any, scheduled: dict[str, int], before: Any) -> list[str]:
    """Careless: takes the step for done."""
    return []


def forget_sharers(scheduler: Any, scheduled: dict[str, int], before: Any) -> list[str]:
    """Careless: leaves requests running that were admitted on blocks of the stopped step."""
    stopped.roll_back(scheduler, scheduled, before)
    return []


HEAD = list(range(1, 22))


def stop_then_hit_the_cache(engine: Engine) -> None:
    """An online request with the same prompt comes right after the step that filled the cache."""
    engine.stop = lambda step: step == 1
    engine.add(make_request("a", [*HEAD, 50], 5, online=False, arrival_s=1.0))
    engine.step()
    engine.add(make_request("b", [*HEAD, 60], 5, online=True, arrival_s=2.0))
    engine.run()
    assert engine.num_stops == 1
    assert engine.outputs["b"] == expected_output([*HEAD, 60], 5)
    assert engine.outputs["a"] == expected_output([*HEAD, 50], 5)
    assert_nothing_left(engine)


def stop_two_that_share(engine: Engine) -> None:
    """The second request is admitted on blocks that the first was to fill in the same stopped
    step; then the first goes away."""
    from vllm.v1.request import RequestStatus

    engine.stop = lambda step: step == 1
    engine.add(make_request("a", [*HEAD, 50], 5, online=False, arrival_s=1.0))
    engine.add(make_request("b", [*HEAD, 60, 61], 5, online=False, arrival_s=2.0))
    engine.step()
    engine.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    engine.run()
    assert engine.num_stops == 1
    assert engine.outputs["b"] == expected_output([*HEAD, 60, 61], 5)
    assert_nothing_left(engine)


def stop_at_random(engine: Engine) -> None:
    chance = random.Random(7)
    engine.stop = lambda step: chance.random() < 0.5
    run_mixed(engine, 7, shared=13)
    assert engine.num_stops > 3
    assert_nothing_left(engine)


def test_the_last_step_says_that_it_was(make_engine: MakeEngine) -> None:
    """Its figures leave with its outputs: none wait for a step that may be hours away."""
    engine = make_engine()
    sent = EngineStats()
    update = engine.scheduler.update_from_output

    def watched(*args: Any) -> Any:
        outputs = update(*args)
        for client in outputs.values():
            if client.scheduler_stats is not None:
                sent.aggregate(EngineStats(data=client.scheduler_stats.kv_connector_stats))
        return outputs

    engine.scheduler.update_from_output = watched
    run_mixed(engine, 3)
    assert sent.data["output_tokens"] == {
        label: sum(len(row) for name, row in engine.outputs.items() if name.startswith(start))
        for label, start in (("online", "on"), ("offline", "off"))
    }
    assert sent.data["running_requests"] == {"online": 0, "offline": 0}
    assert sent.data["waiting_requests"] == {"online": 0, "offline": 0}
    assert engine.scheduler.stats.is_empty()


@pytest.mark.parametrize("play", [stop_then_hit_the_cache, stop_two_that_share, stop_at_random])
def test_blocks_of_a_stopped_step_are_nobodys_prefix(make_engine: MakeEngine, play: Any) -> None:
    play(make_engine(num_blocks=64, max_step_tokens=128))


@pytest.mark.parametrize(
    ("careless", "play"),
    [
        (forget_prefix_cache, stop_then_hit_the_cache),
        (forget_counters, stop_at_random),
        (forget_sharers, stop_two_that_share),
    ],
)
def test_a_careless_stop_is_caught(
    make_engine: MakeEngine, careless: Any, play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the tests above."""
    monkeypatch.setattr(stopper_module, "roll_back", careless)
    with pytest.raises((AssertionError, IndexError, KeyError)):
        play(make_engine(num_blocks=64, max_step_tokens=128))


def test_stale_reads_are_seen() -> None:
    """The device itself is no yes-man."""
    device = Device(BLOCK_SIZE)
    device.slots[(1, 0)] = 17
    from tests.engine.device import Row

    device.rows["a"] = Row([5, 6], [[1]])
    with pytest.raises(StaleReadError):
        device._forward("a", 1, 2)


def test_an_arrival_raises_the_flag_of_the_running_step(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=256, settings=EngineSettings(profile_seconds=0, stop="eager"))
    for i, prompt in enumerate(prompts(3, 4)):
        engine.add(make_request(f"off{i}", prompt, 4, online=False, arrival_s=i * 0.001))
    output = engine.scheduler.schedule()
    record = list(engine.scheduler.driver.steps)[-1]
    assert record.plan.stoppable
    assert not engine.scheduler.stopper.flag.is_raised_for(record.number)
    engine.scheduler.monitor.arrived("on", engine.scheduler.clock.now_s, 8)
    assert engine.scheduler.stopper.flag.is_raised_for(record.number)
    result = engine.device.run(output, stop_at=0)
    engine.scheduler.update_from_output(output, result)
    held_back = engine.scheduler.schedule()
    assert held_back.total_num_scheduled_tokens == 0, "the arrival is on its way"
    engine.scheduler.update_from_output(held_back, engine.device.run(held_back))
    arrival_s = engine.scheduler.clock.now_s
    engine.add(make_request("on", [1, 2, 3], 1, online=True, arrival_s=arrival_s))
    output = engine.scheduler.schedule()
    assert "on" in output.num_scheduled_tokens
    engine.scheduler.update_from_output(output, engine.device.run(output))
    engine.run()


def test_an_arrival_that_is_never_added_holds_nothing_up(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=256)
    engine.add(make_request("off", [1, 2, 3], 4, online=False, arrival_s=0.0))
    engine.scheduler.monitor.arrived("rejected", engine.scheduler.clock.now_s, 8)
    engine.run(most_steps=50)
    assert engine.finished == {"off"}


def test_a_waiting_online_request_displaces_offline_ones(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=17, max_num_seqs=2)
    for i, prompt in enumerate(([1] * 20, [2] * 20)):
        engine.add(make_request(f"off{i}", prompt, 20, online=False, arrival_s=i * 0.001))
    for _ in range(6):
        engine.step()
    assert len(engine.scheduler.running) == 2
    arrival_s = engine.scheduler.clock.now_s
    engine.add(make_request("on", [3] * 24, 2, online=True, arrival_s=arrival_s))
    engine.step()
    assert len(engine.outputs["on"]) == 1, "its first token came in the very next step"
    engine.run()
    assert engine.finished == {"off0", "off1", "on"}
    assert engine.outputs["off0"] == expected_output([1] * 20, 20)


def test_a_prompt_alone_in_a_step_waits_for_no_others(make_engine: MakeEngine) -> None:
    """Also where the operator asks vLLM to let only every fourth step hold prompts."""
    engine = make_engine(num_blocks=256, prefill_interval=4)
    for i in range(3):
        engine.add(make_request(f"off{i}", [i + 1] * 7, 30, online=False, arrival_s=float(i)))
    for _ in range(8):
        engine.step()
    now_s = engine.scheduler.clock.now_s
    engine.add(make_request("on", [9] * 70, 3, online=True, arrival_s=now_s))
    engine.run(most_steps=200)
    assert engine.outputs["on"] == expected_output([9] * 70, 3)


def test_cancelled_requests_give_everything_back(make_engine: MakeEngine) -> None:
    from vllm.v1.request import RequestStatus

    engine = make_engine(num_blocks=64)
    for i, prompt in enumerate(prompts(9, 10)):
        engine.add(make_request(f"r{i}", prompt, 9, online=i % 2 == 0, arrival_s=i * 0.001))
    for i in range(10):
        engine.step()
        engine.scheduler.finish_requests(f"r{i}", RequestStatus.FINISHED_ABORTED)
    engine.run()
    assert_nothing_left(engine)
