"""A stop that meets something else: requests that go away while the stopped step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine.door import RequestStatus
from conserve.engine.stopped import Before
from tests.engine.device import Device, StaleReadError, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

MakeEngine = Callable[[int], Engine]
PROMPTS = {f"off{i}": [20 * i + j + 1 for j in range(18)] for i in range(2)}


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make(depth: int) -> Engine:
        scheduler = make_scheduler(tmp_path, max_step_tokens=64, async_scheduling=depth > 1)
        made.append(scheduler)
        return Engine(scheduler, Device(BLOCK_SIZE), depth=depth)

    yield make
    for scheduler in made:
        scheduler.shutdown()


def stop_while(engine: Engine, happening: Callable[[], object]) -> None:
    """Start a stoppable step of both requests, let something happen, then stop the step."""
    for i, (name, prompt) in enumerate(PROMPTS.items()):
        engine.add(make_request(name, prompt, 4, online=False, arrival_s=float(i)))
    output = engine.scheduler.schedule()
    assert list(engine.scheduler.driver.steps)[-1].plan.stoppable
    assert set(output.num_scheduled_tokens) == set(PROMPTS)
    result = engine.device.run(output, stop_at=2)
    happening()
    engine.scheduler.update_from_output(output, result)


def assert_no_block_is_lost(engine: Engine) -> None:
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is the null block


def cancel_then_ask_the_same(engine: Engine) -> None:
    """vLLM takes cancellations in before it reads the output of the step."""
    stop_while(
        engine,
        lambda: engine.scheduler.finish_requests("off0", RequestStatus.FINISHED_ABORTED),
    )
    prompt = [*PROMPTS["off0"], 99]
    engine.add(make_request("again", prompt, 3, online=True, arrival_s=9.0))
    engine.run(most_steps=100)
    assert engine.outputs["again"] == expected_output(prompt, 3)
    assert engine.outputs["off1"] == expected_output(PROMPTS["off1"], 4)
    assert_no_block_is_lost(engine)


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_blocks_of_a_cancelled_request_are_nobodys_prefix(
    make_engine: MakeEngine, depth: int
) -> None:
    cancel_then_ask_the_same(make_engine(depth))


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_blocks_of_a_cancelled_request_that_stay_named_are_caught(
    make_engine: MakeEngine, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: forget which blocks the step was filling."""
    scheduled = Before.scheduled

    def forgetful(self: Before, *args: Any) -> None:
        scheduled(self, *args)
        self.filling = set()

    monkeypatch.setattr(Before, "scheduled", forgetful)
    with pytest.raises(StaleReadError):
        cancel_then_ask_the_same(make_engine(depth))


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_nothing_is_undone_of_a_request_that_was_sent_back(
    make_engine: MakeEngine, depth: int
) -> None:
    """The prefix cache is reset, running requests and all, while the step is under way."""
    engine = make_engine(depth)

    def reset() -> None:
        assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        assert not engine.scheduler.running

    stop_while(engine, reset)
    engine.run(most_steps=100)
    assert engine.outputs == {name: expected_output(p, 4) for name, p in PROMPTS.items()}
    assert_no_block_is_lost(engine)
