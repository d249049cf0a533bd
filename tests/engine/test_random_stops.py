"""P1, P4 and P7 under thousands of stops at random, on the real scheduler: nothing is left of them.

Everything happens at once: shared prefixes, blocks for a fraction of the requests, online
arrivals, cancellations, stops of every second step at a random layer. The device sees a read of
any slot that a stopped step left half-written, or that is not the reader's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine import stopped
from conserve.engine import stopper as stopper_module
from conserve.engine.door import RequestStatus
from tests.engine.device import VOCABULARY, Device, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

NUM_LAYERS = 8
IN_A_ROUND = 40


@dataclass
class Chaos:
    """Rounds of random requests on one engine, each checked to the last token and block."""

    engine: Engine
    seed: int
    wanted: dict[str, list[int]] = field(default_factory=dict)
    num_rounds: int = 0
    num_cancelled: int = 0

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        stop = random.Random(self.seed + 1)
        self.engine.stop = lambda step: stop.random() < 0.5
        self.engine.stop_layer = lambda: stop.randrange(NUM_LAYERS)
        self.heads = [self._tokens(13) for _ in range(3)]

    def _tokens(self, count: int) -> list[int]:
        return [self.chance.randrange(1, VOCABULARY) for _ in range(count)]

    def run_until(self, num_stops: int) -> None:
        while self.engine.num_stops < num_stops:
            self.play_round()

    def play_round(self) -> None:
        self.num_rounds += 1
        self.wanted.clear()
        self.engine.outputs.clear()
        self.engine.finished.clear()
        for _ in range(IN_A_ROUND):
            self._add()
            for _ in range(self.chance.randrange(4)):
                self.engine.step()
            if self.chance.random() < 0.1:
                self._cancel()
        self.engine.run()
        self._check()

    def _add(self) -> None:
        online = self.chance.random() < 0.3
        name = f"{self.num_rounds}-{len(self.wanted)}"
        head = self.chance.choice([[], *self.heads])
        prompt = head + self._tokens(self.chance.randrange(3, 40))
        length = self.chance.randrange(1, 12)
        now_s = self.engine.scheduler.clock.now_s
        if online:
            self.engine.scheduler.monitor.arrived(name, now_s, len(prompt))
        self.engine.add(make_request(name, prompt, length, online=online, arrival_s=now_s))
        self.wanted[name] = expected_output(prompt, length)

    def _cancel(self) -> None:
        alive = sorted(set(self.wanted) - self.engine.finished)
        if not alive:
            return
        name = self.chance.choice(alive)
        self.engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.wanted[name] = self.engine.outputs[name][:]  # nothing more may come
        self.engine.finished.add(name)
        self.num_cancelled += 1

    def _check(self) -> None:
        for name, wanted in self.wanted.items():
            assert self.engine.outputs[name] == wanted, name
        assert self.engine.finished == set(self.wanted), "no request is lost"
        scheduler = self.engine.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "no block is lost"
        assert not scheduler.running
        assert len(scheduler.waiting) == 0
        assert not scheduler.requests
        assert not scheduler._inflight_prefills


MakeChaos = Callable[..., Chaos]


@pytest.fixture
def make_chaos(tmp_path: Path) -> Iterator[MakeChaos]:
    made: list[Any] = []

    def make(depth: int, num_blocks: int, seed: int = 1, num_drafts: int = 0) -> Chaos:
        scheduler = make_scheduler(
            tmp_path,
            async_scheduling=depth > 1,
            num_blocks=num_blocks,
            num_spec_tokens=num_drafts,
        )
        made.append(scheduler)
        device, right = Device(BLOCK_SIZE), random.Random(seed + 2)
        device.num_accepted = lambda: right.randrange(num_drafts + 1)
        return Chaos(Engine(scheduler, device, depth=depth), seed)

    yield make
    for scheduler in made:
        scheduler.shutdown()


modes = pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
memories = pytest.mark.parametrize("num_blocks", [32, 200], ids=["scarce", "ample"])


@modes
@memories
def test_hundreds_of_stops_leave_no_trace(
    make_chaos: MakeChaos, depth: int, num_blocks: int
) -> None:
    chaos = make_chaos(depth, num_blocks)
    chaos.run_until(num_stops=750)
    assert chaos.num_cancelled > 10


@modes
def test_stops_of_steps_with_drafts_leave_no_trace(make_chaos: MakeChaos, depth: int) -> None:
    """Of which some are right: tokens come several at a time."""
    chaos = make_chaos(depth, num_blocks=40, num_drafts=3)
    chaos.run_until(num_stops=300)
    assert chaos.engine.device.num_right > 100


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 6))
@modes
@memories
def test_ten_thousand_stops_leave_no_trace(
    make_chaos: MakeChaos, depth: int, num_blocks: int, seed: int
) -> None:
    make_chaos(depth, num_blocks, seed).run_until(num_stops=10_000)


def forget_prefix_cache(scheduler: Any, scheduled: dict[str, int], before: Any) -> list[str]:
    """Careless: leaves half-written blocks in the prefix cache."""
    real = stopped._uncache
    try:
        stopped._uncache = lambda kv_cache_manager, request: set()
        return stopped.roll_back(scheduler, scheduled, before)
    finally:
        stopped._uncache = real


def forget_computed_tokens(scheduler: Any, scheduled: dict[str, int], before: Any) -> list[str]:
    """Careless: takes what the step was to compute for computed."""
    kept = {n: r.num_computed_tokens for n, r in scheduler.requests.items() if n in scheduled}
    orphans = stopped.roll_back(scheduler, scheduled, before)
    for name, computed in kept.items():
        scheduler.requests[name].num_computed_tokens = computed
    return orphans


def forget_in_flight_counters(scheduler: Any, scheduled: dict[str, int], before: Any) -> list[str]:
    """Careless: leaves the counters of output that is on its way as the step had set them."""
    requests = [scheduler.requests[name] for name in scheduled if name in scheduler.requests]
    for request in requests:
        request.num_in_flight_tokens += scheduled[request.request_id]
        before[request.request_id].num_new_placeholders = 0
    return stopped.roll_back(scheduler, scheduled, before)


@modes
@pytest.mark.parametrize(
    "careless", [forget_prefix_cache, forget_computed_tokens, forget_in_flight_counters]
)
def test_a_careless_stop_does_not_survive_them(
    make_chaos: MakeChaos, careless: Any, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative controls. The third careless stop, a rank that ignores the flag, is caught in
    test_flag.py and, on real ranks, in tests/stops/test_two_ranks.py."""
    monkeypatch.setattr(stopper_module, "roll_back", careless)

    def stop_often() -> None:
        for seed in range(1, 9):
            make_chaos(depth, 32, seed).run_until(num_stops=750)

    with pytest.raises((AssertionError, IndexError, KeyError)):
        stop_often()
