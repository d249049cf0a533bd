"""Speculative decoding: steps, blocks and accounts with drafts, on the real scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.outputs import DraftTokenIds

from conserve.core.settings import PolicySettings
from conserve.engine.settings import EngineSettings
from tests.engine.device import Device, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

NUM_DRAFTS = 3
WHOLE = list(range(1, 8 * BLOCK_SIZE + 2))
"""Whole blocks and one token: sent again, the prefix cache leaves that one token."""

ACCEPTED = "accepted_draft_tokens"

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make(depth: int, **options: Any) -> Engine:
        options = {"num_spec_tokens": NUM_DRAFTS, **options}
        scheduler = make_scheduler(tmp_path, async_scheduling=depth > 1, **options)
        made.append(scheduler)
        return Engine(scheduler, Device(BLOCK_SIZE), depth=depth)

    yield make
    for scheduler in made:
        scheduler.shutdown()


def ask(engine: Engine, name: str, prompt: list[int], *, online: bool, length: int = 4) -> None:
    now_s = engine.scheduler.clock.now_s
    engine.add(make_request(name, prompt, length, online=online, arrival_s=now_s))


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("online", [True, False], ids=["online", "offline"])
def test_the_same_prompt_twice(make_engine: MakeEngine, depth: int, online: bool) -> None:
    engine = make_engine(depth)
    for name in ("first", "second"):
        ask(engine, name, WHOLE, online=online)
        engine.run()
    wanted = expected_output(WHOLE, 4)
    assert engine.outputs == {"first": wanted, "second": wanted}


def test_it_is_admitted_beside_decodes_that_would_fill_the_step(make_engine: MakeEngine) -> None:
    """vLLM leaves a padded request out rather than run it in parts, for as long as those that
    run take the step: the plan counts its drafts before it fills the step with offline work."""
    num_tokens = 8 * (1 + NUM_DRAFTS) + 2
    settings = EngineSettings(
        profile_seconds=0, policy=PolicySettings(fixed_step_tokens=num_tokens)
    )
    engine = make_engine(1, max_step_tokens=num_tokens, max_num_seqs=9, settings=settings)
    ask(engine, "first", WHOLE, online=True)
    engine.run()
    for i in range(8):
        ask(engine, f"resident-{i}", [500 + i, 2, 3], online=False, length=60)
    while len(engine.outputs["resident-7"]) < 2:
        engine.step()
    ask(engine, "second", WHOLE, online=True)
    for _ in range(6):
        engine.step()
    assert len(engine.outputs["second"]) >= 2


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_are_what_each_request_gets_alone(
    make_engine: MakeEngine, depth: int, seed: int
) -> None:
    """Prompts that share whole blocks, drafts of which some are right, few blocks."""
    engine = make_engine(depth, num_blocks=40)
    chance = random.Random(seed)
    engine.device.num_accepted = lambda: chance.randrange(NUM_DRAFTS + 1)
    wanted = {}
    for i in range(40):
        num_blocks, more = chance.randrange(1, 9), chance.choice([1, 1, 2, 5])
        prompt = WHOLE[: num_blocks * BLOCK_SIZE] + [100 + chance.randrange(3)] * more
        name, length = f"r{i}", chance.randrange(1, 12)
        ask(engine, name, prompt, online=chance.random() < 0.3, length=length)
        wanted[name] = expected_output(prompt, length)
        for _ in range(chance.randrange(5)):
            engine.step()
    engine.run()
    assert engine.outputs == wanted


def collect(engine: Engine) -> dict[str, dict[str, float]]:
    """Everything that is counted from here on, though it is handed over step by step."""
    counted: dict[str, dict[str, float]] = {}

    def count(name: str, amount: float = 1.0, label: str = "") -> None:
        series = counted.setdefault(name, {})
        series[label] = series.get(label, 0.0) + amount

    engine.scheduler.stats.count = count
    return counted


def until(engine: Engine, happened: Callable[[], Any]) -> None:
    for _ in range(200):
        if happened():
            return
        engine.step()
    raise AssertionError("it did not happen")


def until_it_drafts(engine: Engine, name: str) -> Any:
    """Step until drafts of the request are to be judged; the request."""
    request = engine.scheduler.requests[name]
    until(engine, lambda: request.spec_token_ids and request.num_output_tokens)
    return request


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_a_stopped_step_leaves_the_drafts_where_they_were(
    make_engine: MakeEngine, depth: int
) -> None:
    engine = make_engine(depth)
    ask(engine, "off", WHOLE, online=False, length=40)
    request = until_it_drafts(engine, "off")
    drafts, stops = list(request.spec_token_ids), engine.num_stops
    engine.stop = lambda step: True
    until(engine, lambda: engine.num_stops > stops)
    assert request.spec_token_ids == drafts
    engine.stop = lambda step: False
    engine.run()
    assert engine.outputs["off"] == expected_output(WHOLE, 40)


def test_what_a_stopped_worker_drafted_before_is_not_taken_again(make_engine: MakeEngine) -> None:
    """A request that had been sent back to the queue meanwhile would get drafts ahead of its
    prompt's end."""
    engine = make_engine(1)
    ask(engine, "off", WHOLE, online=False, length=40)
    request = until_it_drafts(engine, "off")
    engine.scheduler.driver.last_stopped = True
    request.spec_token_ids = []
    engine.scheduler.update_draft_token_ids(DraftTokenIds(["off"], [[1, 2, 3]]))
    assert request.spec_token_ids == []


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("num_right", [0, 1, NUM_DRAFTS])
def test_drafts_are_counted_and_refused_ones_are_nobodys_work_twice(
    make_engine: MakeEngine, depth: int, num_right: int
) -> None:
    engine = make_engine(depth)
    engine.device.num_accepted = lambda: num_right
    counted = collect(engine)
    ask(engine, "off", WHOLE, online=False, length=41)
    engine.run()
    drafted, accepted = (counted[name]["offline"] for name in ("draft_tokens", ACCEPTED))
    assert drafted % NUM_DRAFTS == 0
    assert accepted * NUM_DRAFTS == drafted * num_right
    assert counted["output_tokens"]["offline"] == 41
    assert "recomputed_tokens" not in counted
    # All but the last token, which nothing is computed behind; the last drafts may pass the end.
    useful = counted["computed_tokens"]["offline"] - (drafted - accepted)
    assert 0 <= useful - (len(WHOLE) + 40) <= num_right


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("draft_model", [False, True])
def test_the_policy_knows_who_has_how_many_blocks(
    make_engine: MakeEngine, depth: int, draft_model: bool
) -> None:
    """Those of refused drafts and of a draft model's lookahead as well."""
    engine = make_engine(depth, num_blocks=200, draft_model=draft_model)
    chance, scheduler = random.Random(0), engine.scheduler
    engine.device.num_accepted = lambda: chance.randrange(NUM_DRAFTS + 1)
    for i in range(6):
        ask(engine, f"r{i}", WHOLE[i : i + 9], online=i % 2 == 0, length=60)
    tables = scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks
    num_looked = 0
    while scheduler.has_unfinished_requests():
        for view in scheduler.tracker.running(scheduler.running):
            assert view.num_blocks == len(tables[view.request_id])
            num_looked += 1
        engine.step()
    assert num_looked > 60


def test_an_arrival_has_blocks_made_free_for_its_drafts(make_engine: MakeEngine) -> None:
    """A draft model writes behind the prompt's end, in the next block. Were only the prompt's own
    counted, the arrival would wait for it as long as the offline request runs."""
    num_blocks, prompt = 24, WHOLE[: 4 * BLOCK_SIZE]
    engine = make_engine(1, num_blocks=num_blocks + 1, draft_model=True)
    room = (num_blocks - 4) * BLOCK_SIZE
    ask(engine, "off", list(range(200, 200 + room - 8)), online=False, length=60)
    scheduler = engine.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    until(engine, lambda: pool.get_num_free_blocks() == 4)
    ask(engine, "on", prompt, online=True)
    for _ in range(4):
        engine.step()
    assert engine.outputs["on"]
