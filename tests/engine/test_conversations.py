"""What online requests leave on the host, through the real scheduler and connector on the pretend
device, which checks every block that is copied (P2), read (P3), and every output (P4)."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.snapshot import RequestView
from conserve.engine.checkpoint.bandwidth import Bandwidth
from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.columns import Columns
from conserve.engine.checkpoint.conversations import Conversations
from conserve.engine.checkpoint.host_view import HostView
from conserve.engine.checkpoint.orders import Ended, Report
from conserve.engine.checkpoint.pool import HostPool, Worth
from conserve.engine.door import RequestStatus
from conserve.engine.steps import GENERIC_MODEL
from tests.engine.copies import ForeignCopyError
from tests.engine.device import VOCABULARY, StaleReadError, expected_output
from tests.engine.engine import Engine, make_request
from tests.engine.test_checkpoints import (
    MakeEngine,
    assert_nothing_left,
    give_ranks,
    make_engine,
    totals_of,
)

pytestmark = pytest.mark.engine

__all__ = ["make_engine"]

QUICK = 0.002
"""A TTFT target at which a restore is quicker than computing even these short prompts."""


class Talk:
    """Conversations that pause while offline documents flow through the KV cache."""

    def __init__(self, engine: Engine, seed: int, *, num_offline: int = 30) -> None:
        self.engine, self.chance = engine, random.Random(seed)
        self.wanted: dict[str, list[int]] = {}
        for i in range(num_offline):
            self.ask(f"off{i}", self.words(self.chance.randrange(20, 50)), 6, online=False)

    def words(self, count: int) -> list[int]:
        return [self.chance.randrange(1, VOCABULARY) for _ in range(count)]

    def ask(
        self, name: str, prompt: list[int], num_output: int, *, online: bool = True, salt: str = ""
    ) -> list[int]:
        """Returns the prompt and its answer, which is what the next turn begins with."""
        now_s = self.engine.scheduler.clock.now_s
        request = make_request(
            name, prompt, num_output, online=online, arrival_s=now_s, salt=salt or None
        )
        self.engine.add(request)
        self.wanted[name] = expected_output(prompt, num_output)
        return prompt + self.wanted[name]

    def finish(self, *names: str) -> None:
        for _ in range(2000):
            if self.engine.finished.issuperset(names):
                return
            self.engine.step()
        raise AssertionError(f"{names} do not end")

    def pause(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.step()

    def run(self, num_turns: int = 5, num_conversations: int = 2, *, cancel: bool = False) -> None:
        histories = [self.words(30) for _ in range(num_conversations)]
        for turn in range(num_turns):
            names = [f"on{turn}-{i}" for i in range(num_conversations)]
            for i, name in enumerate(names):
                prompt = histories[i] + self.words(5)
                histories[i] = self.ask(name, prompt, self.chance.randrange(6, 14))
            if cancel and self.chance.random() < 0.5:
                self.pause(self.chance.randrange(4))
                self.cancel(names.pop())
            self.finish(*names)
            self.pause(self.chance.randrange(8, 16))
        self.end()

    def cancel(self, name: str) -> None:
        if name in self.engine.scheduler.requests:
            self.engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.wanted.pop(name)

    def end(self) -> None:
        self.engine.run()
        assert {name: self.engine.outputs[name] for name in self.wanted} == self.wanted
        assert_nothing_left(self.engine)


def make_quick(make_engine: MakeEngine, depth: int = 1, **options: Any) -> Engine:
    """Steps take the longer the more they compute, so that there is something to save."""
    wishes = {"slo_ttft_s": QUICK, "checkpoint_online": True}
    engine = make_engine(depth, wishes=wishes, **{"num_blocks": 44, **options})
    engine.seconds = lambda record: GENERIC_MODEL.predict_s(record.shape)  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(6))
def test_a_conversation_comes_back_from_the_host(
    make_engine: MakeEngine, depth: int, seed: int
) -> None:
    engine = make_quick(make_engine, depth, pace=seed + 2)
    totals = totals_of(engine)
    Talk(engine, seed).run()
    assert totals["online_restored_tokens"] > 0
    assert totals["computed_tokens online"] + totals["online_restored_tokens"] >= 10 * 35


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(6))
def test_stops_and_cancels_beside_conversations(
    make_engine: MakeEngine, depth: int, seed: int
) -> None:
    engine = make_quick(make_engine, depth, pace=seed + 2)
    totals = totals_of(engine)
    chance = random.Random(seed)
    engine.stop = lambda step: chance.random() < 0.4
    Talk(engine, seed).run(num_turns=8, cancel=True)
    assert engine.num_stops > 0
    assert totals["online_restored_tokens"] > 0


@pytest.mark.parametrize("num_slots", [12, 24])
@pytest.mark.parametrize("seed", range(3))
def test_a_small_pool_keeps_some(make_engine: MakeEngine, num_slots: int, seed: int) -> None:
    engine = make_quick(make_engine, num_slots=num_slots)
    totals = totals_of(engine)
    Talk(engine, seed).run()
    assert totals["checkpoint_evictions evicted"] > 0


@pytest.mark.parametrize("operation", ["store", "load"])
@pytest.mark.parametrize("seed", range(3))
def test_what_cannot_be_copied_is_computed(
    make_engine: MakeEngine, operation: str, seed: int
) -> None:
    chance = random.Random(seed)
    engine = make_quick(
        make_engine, pace=8, fail=lambda doing: doing == operation and chance.random() < 0.2
    )
    totals = totals_of(engine)
    Talk(engine, seed).run()
    assert totals[f"checkpoint_faults {operation}"] > 0


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(3))
def test_what_every_rank_has_comes_back(make_engine: MakeEngine, depth: int, seed: int) -> None:
    engine = make_quick(make_engine, depth)
    give_ranks(engine, 3)
    totals = totals_of(engine)
    Talk(engine, seed).run()
    assert totals["online_restored_tokens"] > 0


def left_by(engine: Engine, prompt: list[int], *, salt: str = "") -> Talk:
    """A conversation of one turn, and then nothing of it on the device."""
    talk = Talk(engine, 0, num_offline=4)
    talk.ask("first", prompt, 6, salt=salt)
    talk.finish("first")
    talk.finish(*(f"off{i}" for i in range(4)))
    engine.scheduler.kv_cache_manager.reset_prefix_cache()
    return talk


def test_other_salts_share_nothing(make_engine: MakeEngine) -> None:
    engine = make_quick(make_engine, pace=8)
    totals = totals_of(engine)
    prompt = [5 + i for i in range(48)]
    talk = left_by(engine, prompt, salt="mine")
    for salt in ("", "yours"):
        talk.ask(f"with {salt}", [*prompt, 1, 2, 3], 2, salt=salt)
        talk.finish(f"with {salt}")
        assert "online_restored_tokens" not in totals
        engine.scheduler.kv_cache_manager.reset_prefix_cache()
    talk.ask("again", [*prompt, 1, 2, 3], 2, salt="mine")
    talk.end()
    assert totals["online_restored_tokens"] >= 44


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_weights_may_change_before_a_turn_has_run(make_engine: MakeEngine, depth: int) -> None:
    """No worker knows a request whose KV comes back: without that it is as new to them."""
    engine = make_quick(make_engine, depth, pace=8)
    prompt = [5 + i for i in range(48)]
    talk = left_by(engine, prompt)
    talk.ask("second", [*prompt, 1, 2, 3], 6)
    while not engine.scheduler.checkpointer.is_loading("second"):
        engine.step()
    assert engine.scheduler.requests["second"].num_preemptions == 0
    assert engine.scheduler.reset_prefix_cache(True, True)
    talk.end()


def test_nothing_outlives_a_change_of_weights(make_engine: MakeEngine) -> None:
    engine = make_quick(make_engine, pace=8)
    totals = totals_of(engine)
    prompt = [5 + i for i in range(48)]
    talk = left_by(engine, prompt)
    assert engine.scheduler.checkpointer.pool.num_used_slots > 0
    engine.scheduler.reset_prefix_cache()
    assert engine.scheduler.checkpointer.pool.num_used_slots == 0
    talk.ask("again", [*prompt, 1, 2, 3], 2)
    talk.end()
    assert "online_restored_tokens" not in totals


@pytest.mark.parametrize("fails", [False, True], ids=["loaded", "load-failed"])
def test_a_load_that_the_engine_would_not_begin_is_not_waited_for(
    make_engine: MakeEngine, fails: bool
) -> None:
    """vLLM keeps blocks free for all that was to be brought back and is not whole yet; offline
    requests do not go on while an online one waits."""
    failing = {"load"} if fails else set()
    engine = make_quick(make_engine, num_blocks=30, pace=8, fail=failing.__contains__)
    requests = engine.scheduler.requests
    prompt = [5 + i for i in range(48)]
    talk = left_by(engine, prompt)
    talk.ask("off", talk.words(80), 6, online=False)
    while requests["off"].num_computed_tokens < 56:
        engine.step()
    talk.ask("big", talk.words(64), 2)
    talk.finish("big")
    while requests["off"].status != RequestStatus.WAITING_FOR_REMOTE_KVS:
        engine.step()
    talk.ask("again", [*prompt, 1, 2, 3], 2)
    engine.step()
    failing.clear()
    talk.end()


def test_a_name_used_again_is_another_request(make_engine: MakeEngine) -> None:
    engine = make_quick(make_engine, pace=8)
    talk = left_by(engine, [5 + i for i in range(48)])
    engine.finished.clear()
    talk.ask("first", [9 + i for i in range(52)], 3)
    talk.end()


class Counted(list[str]):
    """Hashes; how many of them somebody has looked at."""

    num_looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_looks += 1
        return super().__getitem__(index)


def test_what_others_completed_is_adopted_in_place_of_a_tail_on_disk() -> None:
    """A restore never covers less for it, and moves of slots are ordered with the step's loads."""
    pool = HostPool(num_slots=3, block_size=4, num_disk_slots=4)
    host = Checkpointer(pool, Bandwidth(token_bytes=16), num_ranks=1)
    request = SimpleNamespace(request_id="a", block_hashes=["h0", "h1", "h2"], priority=0)
    for name, num_tokens, worth in (("a", 10, 1.0), ("b", 12, 9.0)):
        pool.grow(name, num_tokens, request.block_hashes[: num_tokens // 4], Worth(worth))
        pool.written(name, num_tokens, request.block_hashes[: num_tokens // 4])
        if name == "a":
            pool.grow("c", 4, [], Worth(9.0))
            pool.drop("c")
    assert [pool.is_on_disk(slot) for slot in pool._entries["a"].slots] == [True] * 3
    ordered = pool._eviction._moves[:]
    host.adopt(request, 10, Worth(1.0))
    assert pool.num_covered_tokens("a") == 12
    assert host.take_orders().moves == ordered
    assert not host.take_orders().moves


def test_what_was_said_is_not_looked_through_in_each_step() -> None:
    hashes = Counted("abcdefgh")
    host = Checkpointer(
        HostPool(0, 4), Bandwidth(16.0), num_ranks=1, conversations=Conversations(4)
    )
    host.take(Report(pools=[16], bytes_per_s=1e6))
    host.pool.grow("left", 32, hashes, Worth(1.0), online=True)
    host.pool.written("left", 32, hashes)
    view, requests = RequestView("on", True, 0.0, 40), {"on": SimpleNamespace(block_hashes=hashes)}
    for num_blocks, found in ((0, 32), (8, 32), (9, 32)):
        view.num_blocks, hashes.num_looks = num_blocks, 0
        HostView(host).describe_online([view], requests)
        assert view.num_checkpointed_tokens == view.num_copying_tokens == found
        assert hashes.num_looks == (1 if num_blocks else len(hashes))
    host.pool.drop("left")
    HostView(host).describe_online([view], requests)
    assert view.num_checkpointed_tokens == 0


# Negative controls


def copies_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: copies under way go on when their request has ended and its blocks are free."""
    monkeypatch.setattr(Checkpointer, "_end", lambda self, sent: None)


def counted_though_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: what was under way when the request ended counts as copied."""
    add = Ended.add

    def forgetful(self: Ended, other: Ended) -> None:
        add(self, other)
        self.dropped = False

    monkeypatch.setattr(Ended, "add", forgetful)


def found_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: blocks are found by where they stand, not by their hash."""
    name_of = Columns._name

    def place(self: Columns, number: int, hashes: Any, index: int) -> Any:
        return None if name_of(self, number, hashes, index) is None else (number, index)

    monkeypatch.setattr(Columns, "_name", place)


@pytest.mark.parametrize("careless", [copies_go_on, counted_though_dropped, found_by_length])
def test_a_careless_host_is_caught(
    make_engine: MakeEngine, careless: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    careless(monkeypatch)

    def run_some() -> None:
        for seed in range(8):
            Talk(make_quick(make_engine, pace=1 + seed % 3), seed).run()

    with pytest.raises((ForeignCopyError, StaleReadError)):
        run_some()
