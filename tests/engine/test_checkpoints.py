"""Checkpoints through the real scheduler and connector, on a device that owns every block.

P2: no copy reads a block that has changed hands, none writes to one. P3: what is restored is
what was computed. P4: every output is what the request gets alone. P7: tokens add up.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.plan import Plan
from conserve.engine.checkpoint import checkpointer, keeping
from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.copy_queue import CopyQueue
from conserve.engine.checkpoint.orders import Orders
from conserve.engine.connector import ConserveConnector, StepMetadata
from conserve.engine.door import RequestStatus
from conserve.engine.settings import EngineSettings
from tests.engine.copies import (
    CheckedCopies,
    DawdlingCopier,
    ForeignCopyError,
    PretendStore,
    Ranks,
    rank_is_ready,
)
from tests.engine.device import VOCABULARY, Device, StaleReadError, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

MakeEngine = Callable[..., Engine]
SLOT_BYTES = 512
NO_WISHES: Mapping[str, Any] = {}
FAST = 1e6
"""Bytes a second that let a step's copies begin in it, with this clock."""


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make(
        depth: int = 1,
        *,
        mode: str = "incremental",
        num_slots: int = 512,
        bytes_per_s: float = FAST,
        pace: int = 3,
        fail: Any = None,
        wishes: Mapping[str, Any] = NO_WISHES,
        **options: Any,
    ) -> Engine:
        settings = EngineSettings(
            **wishes,
            profile_seconds=0,
            checkpoint=mode,
            checkpoint_bytes=num_slots * SLOT_BYTES,
            checkpoint_bytes_per_s=bytes_per_s,
        )
        scheduler = make_scheduler(
            tmp_path, settings=settings, async_scheduling=depth > 1, **options
        )
        made.append(scheduler)
        device = Device(BLOCK_SIZE)
        device.connector = worker_half(scheduler, device, pace, fail)
        return Engine(scheduler, device, depth=depth)

    yield make
    for scheduler in made:
        scheduler.shutdown()


def worker_half(scheduler: Any, device: Device, pace: int, fail: Any) -> ConserveConnector:
    """Our connector as a worker has it, with a copier that dawdles."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    connector = ConserveConnector(
        scheduler.vllm_config, KVConnectorRole.WORKER, scheduler.kv_cache_config
    )
    copies = CheckedCopies(PretendStore(device, fail), scheduler, device)
    connector.worker_side.copies.copier = DawdlingCopier(copies, random.Random(pace), pace)
    rank_is_ready(scheduler)
    return connector


def give_ranks(engine: Engine, number: int, fail: Any = None) -> None:
    """More ranks, whose copies get on at paces of their own; `fail` fails on the last one."""
    scheduler = engine.scheduler
    scheduler.checkpointer._ranks.num_ranks = number
    devices = [Device(BLOCK_SIZE) for _ in range(number)]
    for i, device in enumerate(devices):
        rank_fails = fail if i == number - 1 else None
        device.connector = worker_half(scheduler, device, i + 1, rank_fails)
    engine.device = Ranks(devices)


def totals_of(engine: Engine) -> dict[str, float]:
    """The figures handed over so far, summed from here on; counters only, by name and label."""
    connector = engine.scheduler.connector
    totals: dict[str, float] = {}
    hand_over = connector.get_kv_connector_stats

    def keep() -> Any:
        stats = hand_over()
        for name, label, value in stats.items() if stats else ():
            if isinstance(value, float | int):
                key = f"{name} {label}".strip()
                totals[key] = totals.get(key, 0.0) + value
        return stats

    connector.get_kv_connector_stats = keep
    return totals


def prompts(chance: random.Random, count: int, shared: int = 0) -> list[list[int]]:
    head = [chance.randrange(1, VOCABULARY) for _ in range(shared)]
    return [
        head + [chance.randrange(1, VOCABULARY) for _ in range(chance.randrange(3, 40))]
        for _ in range(count)
    ]


def run_bursts(
    engine: Engine, seed: int, *, shared: int = 0, cancel: bool = False, logprobs: int = 0
) -> None:
    """Offline work that fills memory, and bursts of online prompts that need the blocks. The first
    `logprobs` offline requests want those of their prompts."""
    chance = random.Random(seed)
    wanted: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts(chance, 14, shared)):
        length = chance.randrange(4, 24)
        request = make_request(f"off{i}", prompt, length, online=False, arrival_s=i * 0.001)
        request.skip_reading_prefix_cache = i < logprobs
        engine.add(request)
        wanted[f"off{i}"] = expected_output(prompt, length)
    for burst in range(5):
        for _ in range(chance.randrange(3, 9)):
            engine.step()
        for i, prompt in enumerate(prompts(chance, chance.randrange(1, 4), shared)):
            name, now_s = f"on{burst}-{i}", engine.scheduler.clock.now_s
            length = chance.randrange(1, 5)
            engine.add(make_request(name, prompt, length, online=True, arrival_s=now_s))
            wanted[name] = expected_output(prompt, length)
        if cancel:
            victim = f"off{chance.randrange(14)}"
            if victim in engine.scheduler.requests:
                engine.scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
                wanted.pop(victim, None)
    engine.run()
    assert {name: engine.outputs[name] for name in wanted} == wanted
    assert_nothing_left(engine)


def assert_nothing_left(engine: Engine) -> None:
    scheduler = engine.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is the null block
    assert not scheduler.running
    assert not scheduler.waiting
    assert not scheduler.kv_holding_waiting
    for device in getattr(engine.device, "devices", [engine.device]):
        if copier := device.connector.worker_side.copies.copier:
            copier.finish()
        report = device.connector.build_connector_worker_meta()
        if report is not None:
            scheduler.checkpointer.take(report)
    assert not scheduler.checkpointer.under_way
    kept = scheduler.checkpointer.pool.num_slots_of(online=False)
    assert not kept, "only what online requests left is kept"
    scheduler.checkpointer.forget_all()
    assert scheduler.checkpointer.pool.num_used_slots == 0


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("mode", ["incremental", "swap"])
@pytest.mark.parametrize("seed", range(5))
def test_displaced_requests_come_back_as_they_were(
    make_engine: MakeEngine, depth: int, mode: str, seed: int
) -> None:
    engine = make_engine(depth, mode=mode, num_blocks=26, pace=seed + 1)
    totals = totals_of(engine)
    run_bursts(engine, seed)
    assert totals["displaced_requests"] > 0
    assert totals["restored_tokens memory"] > 0
    assert totals["restored_tokens memory"] <= totals["displaced_tokens"] * 5


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("shared", [0, 13], ids=["distinct", "shared-prefix"])
@pytest.mark.parametrize("seed", range(6))
def test_stops_and_cancels_beside_copies(
    make_engine: MakeEngine, depth: int, shared: int, seed: int
) -> None:
    engine = make_engine(depth, num_blocks=30, pace=seed + 1)
    chance = random.Random(seed)
    engine.stop = lambda step: chance.random() < 0.4
    run_bursts(engine, seed, shared=shared, cancel=True)
    assert engine.num_stops > 0
    assert engine.device.connector.worker_side.copies.copier.copies.num_stored > 0


def run_with_drafts(
    make_engine: MakeEngine, depth: int, seed: int, *, draft_model: bool
) -> dict[str, float]:
    """Bursts and stops, where drafts are right by chance; the figures."""
    engine = make_engine(
        depth, num_blocks=32, pace=seed + 1, num_spec_tokens=3, draft_model=draft_model
    )
    totals, chance = totals_of(engine), random.Random(seed)
    engine.stop = lambda step: chance.random() < 0.3
    engine.device.num_accepted = lambda: chance.randrange(4)
    run_bursts(engine, seed)
    assert engine.num_stops > 0
    return totals


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("draft_model", [False, True], ids=["n-grams", "draft-model"])
def test_no_copy_holds_a_draft(make_engine: MakeEngine, depth: int, draft_model: bool) -> None:
    totals: Counter[str] = Counter()
    for seed in range(4):
        totals.update(run_with_drafts(make_engine, depth, seed, draft_model=draft_model))
    assert totals["displaced_requests"] > 0
    assert totals["restored_tokens memory"] > 0
    assert totals["draft_tokens offline"] > totals["accepted_draft_tokens offline"] > 0


@pytest.mark.parametrize("seed", range(4))
def test_a_small_pool_keeps_some(make_engine: MakeEngine, seed: int) -> None:
    engine = make_engine(num_blocks=26, num_slots=14, pace=seed + 1)
    run_bursts(engine, seed)


@pytest.mark.parametrize("operation", ["store", "load"])
@pytest.mark.parametrize("seed", range(3))
def test_what_cannot_be_copied_is_computed_again(
    make_engine: MakeEngine, operation: str, seed: int
) -> None:
    chance = random.Random(seed)
    engine = make_engine(
        num_blocks=26, fail=lambda doing: doing == operation and chance.random() < 0.3
    )
    totals = totals_of(engine)
    run_bursts(engine, seed)
    assert totals[f"checkpoint_faults {operation}"] > 0


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(3))
def test_a_copy_counts_when_every_rank_has_it(
    make_engine: MakeEngine, depth: int, seed: int
) -> None:
    engine = make_engine(depth, num_blocks=26)
    give_ranks(engine, 3)
    totals = totals_of(engine)
    run_bursts(engine, seed)
    assert totals["restored_tokens memory"] > 0


@pytest.mark.parametrize("operation", ["store", "load"])
def test_a_failure_on_one_rank_is_a_failure(make_engine: MakeEngine, operation: str) -> None:
    engine = make_engine(num_blocks=26)
    chance = random.Random(1)
    give_ranks(engine, 2, lambda doing: doing == operation and chance.random() < 0.3)
    totals = totals_of(engine)
    run_bursts(engine, 1)
    assert totals[f"checkpoint_faults {operation}"] > 0


def give_up_midway(engine: Engine, seed: int) -> None:
    """The last rank's copies end for good, while others' are under way."""
    copier = engine.device.devices[-1].connector.worker_side.copies.copier
    begin_step = copier.begin_step

    def begin(orders: Orders) -> None:
        if any(not job.store and job.number > 10 + 5 * seed for job in orders.jobs):
            copier.queue.give_up("its thread has failed")
        begin_step(orders)

    copier.begin_step = begin


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(4))
def test_a_rank_whose_copies_end_leaves_nobody_waiting(
    make_engine: MakeEngine, depth: int, seed: int
) -> None:
    """P0: who was coming back computes again. P2: what other ranks were copying ends."""
    engine = make_engine(depth, num_blocks=26)
    give_ranks(engine, 2)
    give_up_midway(engine, seed)
    run_bursts(engine, seed)
    assert engine.scheduler.checkpointer.unusable == "its thread has failed"
    assert engine.device.devices[0].connector.worker_side.copies.copier is None


def test_a_plan_that_is_put_off_gives_its_copies_all_the_same(make_engine: MakeEngine) -> None:
    """A snapshot spends the budget of its turn: nothing would be copied in steps that follow one
    whose output is not read yet."""
    engine = make_engine(2, num_blocks=26)
    driver = engine.scheduler.driver
    driver.dispatch_blocks = True
    engine.stop = lambda step: False
    planned: list[Plan] = []
    followed: list[Plan] = []
    planner, follow = driver.planner, driver.keeper.follow

    def plan(*args: Any) -> Plan:
        planned.append(planner(*args))
        return planned[-1]

    def note(plan: Plan) -> None:
        followed.append(plan)
        follow(plan)

    driver.planner, driver.keeper.follow = plan, note
    run_bursts(engine, 2)
    copied = [plan.checkpoint for plan in followed if plan.checkpoint]
    assert copied == [plan.checkpoint for plan in planned if plan.checkpoint]
    assert any(plan.checkpoint and not plan.grants for plan in followed), "none was put off"


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_who_wants_prompt_logprobs_is_computed_again(make_engine: MakeEngine, depth: int) -> None:
    """vLLM restores no such request, so nobody waits for it and none of it is copied."""
    engine = make_engine(depth)
    copied: set[str] = set()
    keeper = engine.scheduler.checkpointer
    checkpoint = keeper.checkpoint

    def note(request: Any, *args: Any, **how: Any) -> Any:
        copied.add(request.request_id)
        return checkpoint(request, *args, **how)

    keeper.checkpoint = note
    totals = totals_of(engine)
    run_bursts(engine, 3, logprobs=7)
    assert totals["recomputed_tokens offline"] > 0
    of_offline = {name for name in copied if name.startswith("off")}
    assert of_offline == {f"off{i}" for i in range(7, 14)}


def test_a_restored_request_computes_one_token_again_at_most(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=26, pace=20, num_slots=512, max_step_tokens=128)
    totals = totals_of(engine)
    run_bursts(engine, 3)
    assert totals["displaced_requests"] > 2
    again = totals.get("recomputed_tokens offline", 0.0)
    assert again <= totals["displaced_requests"], "one token each"


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_without_checkpoints_all_of_it_is_computed_again(
    make_engine: MakeEngine, depth: int
) -> None:
    engine = make_engine(depth, num_blocks=26, mode="off")
    assert "switched off" in engine.scheduler.checkpointer.unusable
    engine.device.connector = None
    totals = totals_of(engine)
    chance = random.Random(3)
    wanted = {}
    for i, prompt in enumerate(prompts(chance, 14)):
        engine.add(make_request(f"off{i}", prompt, 12, online=False, arrival_s=i * 0.001))
        wanted[f"off{i}"] = expected_output(prompt, 12)
    for _ in range(6):
        engine.step()
    now_s = engine.scheduler.clock.now_s
    engine.add(make_request("on", list(range(1, 90)), 2, online=True, arrival_s=now_s))
    engine.run()
    assert {name: engine.outputs[name] for name in wanted} == wanted
    assert totals["recomputed_tokens offline"] > 0


# Negative controls


def ignore_displacement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: copies under way go on when their blocks change hands."""
    monkeypatch.setattr(Checkpointer, "leaves", lambda *args: None)
    monkeypatch.setattr(Checkpointer, "_drop", lambda *args: None)


def free_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: the forward does not wait for copies out of blocks that it overwrites."""
    monkeypatch.setattr(CopyQueue, "is_over", lambda self, numbers: True)


def copy_past_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: an off-by-one tail."""
    real = Checkpointer.checkpoint

    def checkpoint(
        self: Any, request: Any, num_tokens: int, *args: Any, leaves: bool = False
    ) -> Any:
        return real(self, request, num_tokens + 1, *args, leaves=leaves)

    monkeypatch.setattr(Checkpointer, "checkpoint", checkpoint)


def test_copies_of_drafts_are_caught(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Careless: what is in flight counts as settled."""
    for module in (checkpointer, keeping):
        monkeypatch.setattr(module, "num_settled", lambda request: request.num_computed_tokens)

    def run_some() -> None:
        for seed in range(8):
            run_with_drafts(make_engine, 2, seed, draft_model=False)

    with pytest.raises((ForeignCopyError, StaleReadError)):
        run_some()


def give_up_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: the other ranks go on with what they were copying."""
    real = Checkpointer.take_orders

    def take_orders(self: Checkpointer) -> Orders:
        orders = real(self)
        orders.give_back = False
        return orders

    monkeypatch.setattr(Checkpointer, "take_orders", take_orders)


def test_copies_that_go_on_when_another_rank_has_given_up_are_caught(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_up_alone(monkeypatch)

    def run_some() -> None:
        for seed in range(8):
            engine = make_engine(num_blocks=26, pace=1)
            give_ranks(engine, 2)
            give_up_midway(engine, seed % 4)
            run_bursts(engine, seed)

    with pytest.raises((ForeignCopyError, StaleReadError)):
        run_some()


@pytest.mark.parametrize("careless", [ignore_displacement, free_without_waiting, copy_past_the_end])
def test_a_careless_checkpoint_is_caught(
    make_engine: MakeEngine, careless: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    careless(monkeypatch)

    def run_some() -> None:
        for seed in range(6):
            run_bursts(make_engine(num_blocks=26, pace=1), seed)

    with pytest.raises((ForeignCopyError, StaleReadError)):
        run_some()


def test_copies_of_a_step_begin_once(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our worker asks first, with the metadata of all connectors; vLLM's runner asks again."""
    connector = make_engine().device.connector
    begun: list[Orders] = []
    monkeypatch.setattr(connector.worker_side.copies, "begin_step", begun.append)
    ours, next_one = StepMetadata(), StepMetadata()
    connector.begin_copies(SimpleNamespace(metadata=(object(), ours)))
    connector.handle_preemptions(ours)
    connector.begin_copies(None)
    connector.handle_preemptions(next_one)
    assert [id(orders) for orders in begun] == [id(ours.orders), id(next_one.orders)]
