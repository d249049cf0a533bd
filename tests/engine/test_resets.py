"""Reinforcement learning: pause, update the weights, resume, while both classes are served.

The real scheduler and connector, with copies that dawdle. The pretend device knows which weights
the KV in each slot was computed with: whatever survives an update and is read is seen at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

pytest.importorskip("vllm")

from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.keeping import CheckpointKeeper
from conserve.engine.door import PauseState, RequestStatus
from conserve.engine.snapshots import Snapshots
from tests.engine.copies import ForeignCopyError
from tests.engine.device import VOCABULARY, StaleReadError
from tests.engine.engine import Engine, make_request
from tests.engine.test_checkpoints import (
    MakeEngine,
    assert_nothing_left,
    make_engine,
    totals_of,
)

__all__ = ["make_engine"]
pytestmark = pytest.mark.engine

MOST_TURNS = 400
"""Of the engine's loop, within which a pause is complete."""


class Loop:
    """An engine with both classes at work, paused now and then. Aborted offline work comes back
    under another name, as the lines of batches do."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.scheduler = engine, engine.scheduler
        self.chance = random.Random(seed)
        self.head = [self.chance.randrange(1, VOCABULARY) for _ in range(9)]
        self.wanted: dict[str, int] = {}
        """Name -> output tokens."""
        self.num_added = 0

    def add(self, *, online: bool) -> None:
        self.num_added += 1
        length, name = self.chance.randrange(2, 14), f"{'on' if online else 'off'}{self.num_added}"
        tail = [self.chance.randrange(1, VOCABULARY) for _ in range(self.chance.randrange(3, 40))]
        prompt = self.head + tail if self.chance.random() < 0.5 else tail
        now_s = self.scheduler.clock.now_s
        self.wanted[name] = length
        self.engine.add(make_request(name, prompt, length, online=online, arrival_s=now_s))

    def work(self, num_turns: int) -> None:
        for _ in range(num_turns):
            if len(self.scheduler.requests) < 14:
                self.add(online=False)
            if self.chance.random() < 0.25:
                self.add(online=True)
            self.engine.step()

    def pause(self, mode: str) -> None:
        """As `EngineCoreProc.pause_scheduler`; chats go on coming."""
        if mode == "abort":
            for request in self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED):
                del self.wanted[request.request_id]
        keeps = mode == "keep"
        self.scheduler.set_pause_state(PauseState.PAUSED_ALL if keeps else PauseState.PAUSED_NEW)
        for turn in range(MOST_TURNS):
            if not self.scheduler.has_requests() and not self.engine._queue:
                break
            if turn % 3 == 0 and len(self.scheduler.waiting.online) < 8:
                self.add(online=True)
            self.engine.step()
        else:
            raise AssertionError(f"a pause with mode={mode} never ends")
        self.engine.device.connector.worker_side.copies.settle()

    def update(self) -> None:
        """As `_reset_caches`, and new weights."""
        assert self.scheduler.reset_prefix_cache(True, True), "KV is still held"
        self.engine.device.update_weights()

    def resume(self) -> None:
        self.scheduler.set_pause_state(PauseState.UNPAUSED)

    def end(self) -> None:
        self.engine.run(most_steps=20_000)
        given = {name: len(self.engine.outputs[name]) for name in self.wanted}
        assert given == self.wanted
        assert_nothing_left(self.engine)


def run_loop(
    engine: Engine, seed: int, modes: tuple[str, ...], num_updates: int, most_turns: int = 50
) -> None:
    loop = Loop(engine, seed)
    for _ in range(num_updates):
        loop.work(loop.chance.randrange(3, most_turns))
        loop.pause(loop.chance.choice(modes))
        loop.update()
        loop.resume()
    loop.end()


MODES = ("keep", "wait", "abort")
DEPTHS = pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])


@DEPTHS
@pytest.mark.parametrize("mode", MODES)
def test_no_kv_of_old_weights_is_ever_read(make_engine: MakeEngine, depth: int, mode: str) -> None:
    engine = make_engine(depth, num_blocks=30)
    chance, totals = random.Random(1), totals_of(engine)
    engine.stop = lambda step: chance.random() < 0.3
    run_loop(engine, 1, (mode,), 40)
    assert engine.device.weights == 40
    assert totals["displaced_requests"] > 3
    assert totals["restored_tokens memory"] > 0


@DEPTHS
def test_a_thousand_updates(make_engine: MakeEngine, depth: int) -> None:
    engine = make_engine(depth, num_blocks=30, num_slots=20, pace=1)
    run_loop(engine, 5, MODES, 500, most_turns=12)


@DEPTHS
def test_a_reset_without_a_pause_takes_everything_back(make_engine: MakeEngine, depth: int) -> None:
    """Steps are in flight, restores too."""
    engine = make_engine(depth, num_blocks=30, pace=1)
    chance = random.Random(2)
    engine.stop = lambda step: chance.random() < 0.3
    loop = Loop(engine, 2)
    for _ in range(60):
        loop.work(chance.randrange(1, 9))
        assert loop.scheduler.reset_prefix_cache(True)
    loop.end()


def holds_restored_blocks(engine: Engine) -> Loop:
    """A loop at a moment at which a waiting request holds blocks that are being filled."""
    loop = Loop(engine, 3)
    for _ in range(500):
        loop.work(1)
        if any(loop.scheduler.checkpointer.is_loading(name) for name in loop.scheduler.requests):
            return loop
    raise AssertionError("nothing was restored")


def test_requests_that_hold_restored_blocks_let_go_of_them(make_engine: MakeEngine) -> None:
    loop = holds_restored_blocks(make_engine(num_blocks=30, pace=1))
    assert loop.scheduler.kv_holding_waiting
    assert loop.scheduler.reset_prefix_cache(True, True)
    assert not loop.scheduler.kv_holding_waiting
    loop.end()


def test_with_nothing_running_held_blocks_stand_in_no_resets_way(make_engine: MakeEngine) -> None:
    loop = holds_restored_blocks(make_engine(num_blocks=30, pace=1))
    while loop.scheduler.running:
        loop.scheduler._preempt_request(loop.scheduler.running.pop(), 0.0)
    assert loop.scheduler.kv_holding_waiting
    assert loop.scheduler.reset_prefix_cache()
    loop.end()


def test_a_frozen_engine_changes_nothing(make_engine: MakeEngine) -> None:
    """With mode=keep nobody is displaced for an arrival that is not let in."""
    engine = make_engine(num_blocks=30)
    loop, totals = Loop(engine, 4), totals_of(engine)
    loop.work(5)
    running = list(loop.scheduler.running)
    loop.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(8):
        loop.add(online=True)
    before = totals.get("displaced_requests", 0.0)
    for _ in range(5):
        output = loop.scheduler.schedule()
        assert not output.total_num_scheduled_tokens
        loop.scheduler.update_from_output(output, engine.device.run(output))
    assert loop.scheduler.running == running
    assert totals.get("displaced_requests", 0.0) == before
    loop.resume()
    loop.end()


# Negative controls


def keep_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpointer, "forget_all", lambda *_: None)


def keep_held_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointKeeper, "before_reset", lambda _: None)


def let_arrivals_displace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshots, "_new_online", lambda self: self._scheduler.waiting.online)


@pytest.mark.parametrize(
    ("careless", "mode", "error"),
    [
        (keep_the_pool, "keep", (StaleReadError, ForeignCopyError)),
        (keep_held_blocks, "keep", RuntimeError),
        (let_arrivals_displace, "wait", AssertionError),
    ],
)
def test_careless_resets_are_caught(
    make_engine: MakeEngine,
    careless: Callable[[pytest.MonkeyPatch], None],
    mode: str,
    error: type[Exception] | tuple[type[Exception], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    careless(monkeypatch)
    engines = [make_engine(num_blocks=30, pace=1) for _ in range(10)]
    with pytest.raises(error):
        run_all(engines, mode)


def run_all(engines: list[Engine], mode: str) -> None:
    for seed, engine in enumerate(engines):
        run_loop(engine, seed, (mode,), 20)
