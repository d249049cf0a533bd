"""P0 on vLLM's own scheduler and KV manager, where memory holds one request and no token more.

Copies dawdle, so that restores are under way when somebody else needs the blocks or the slot.
"""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vllm")

from conserve.engine.checkpoint.keeping import CheckpointKeeper
from tests.engine.device import VOCABULARY, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request
from tests.engine.test_checkpoints import (
    MakeEngine,
    assert_nothing_left,
    make_engine,
    totals_of,
)

__all__ = ["make_engine"]
pytestmark = pytest.mark.engine

NUM_BLOCKS = 16
"""Beside vLLM's null block."""
MOST_TOKENS = NUM_BLOCKS * BLOCK_SIZE


def run_tight(engine: Engine, seed: int, *, lengths: tuple[int, ...], most_steps: int) -> None:
    """Both classes, some as long as memory; online ones come while offline ones come back."""
    chance = random.Random(seed)
    wanted: dict[str, list[int]] = {}

    def add(name: str, *, online: bool) -> None:
        total = chance.choice(lengths)
        num_output = chance.randrange(1, min(12, total - 1))
        # The last token is sampled and never computed.
        prompt = [chance.randrange(1, VOCABULARY) for _ in range(total - num_output + 1)]
        wanted[name] = expected_output(prompt, num_output)
        now_s = engine.scheduler.clock.now_s
        engine.add(make_request(name, prompt, num_output, online=online, arrival_s=now_s))

    for i in range(6):
        add(f"off{i}", online=False)
    for i in range(14):
        for _ in range(chance.randrange(12)):
            engine.step()
        add(f"on{i}", online=True)
    engine.run(most_steps)
    assert {name: engine.outputs[name] for name in wanted} == wanted
    assert_nothing_left(engine)


DEPTHS = pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
LENGTHS = {
    "all as long as memory": (MOST_TOKENS,),
    "a block less": (MOST_TOKENS, MOST_TOKENS - BLOCK_SIZE, MOST_TOKENS - 1),
    "halves": (MOST_TOKENS, MOST_TOKENS // 2, MOST_TOKENS // 2 + 1, 7),
}


@DEPTHS
@pytest.mark.parametrize("max_num_seqs", [1, 2])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("mode", ["incremental", "swap"])
def test_nobody_waits_for_ever(
    make_engine: MakeEngine, depth: int, max_num_seqs: int, lengths: tuple[int, ...], mode: str
) -> None:
    restored = 0.0
    for seed in range(3):
        engine = make_engine(
            depth,
            mode=mode,
            num_blocks=NUM_BLOCKS + 1,
            max_num_seqs=max_num_seqs,
            max_step_tokens=64,
            pace=1 + seed % 2,
        )
        chance, totals = random.Random(seed), totals_of(engine)
        engine.stop = lambda step, chance=chance: chance.random() < 0.3
        run_tight(engine, seed, lengths=lengths, most_steps=3000)
        restored += totals.get("restored_tokens memory", 0.0)
    assert restored > 0


def test_restored_requests_that_do_not_yield_are_caught(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Careless: who was brought back keeps its blocks, whoever waits for them."""
    monkeypatch.setattr(CheckpointKeeper, "give_back", lambda *_: None)
    engines = [
        make_engine(num_blocks=NUM_BLOCKS + 1, max_num_seqs=2, max_step_tokens=64, pace=1)
        for _ in range(8)
    ]
    with pytest.raises(AssertionError, match="requests remain"):
        run_all(engines)


def run_all(engines: list[Engine]) -> None:
    for seed, engine in enumerate(engines):
        run_tight(engine, seed, lengths=LENGTHS["halves"], most_steps=1500)
