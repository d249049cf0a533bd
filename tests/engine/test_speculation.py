"""Speculative decoding: vLLM pads what waits with one token left, and insists on the padding."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.settings import PolicySettings
from conserve.engine.settings import EngineSettings
from tests.engine.device import Device, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

NUM_DRAFTS = 3
WHOLE = list(range(1, 8 * BLOCK_SIZE + 2))
"""Whole blocks and one token: sent again, the prefix cache leaves that one token."""

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
