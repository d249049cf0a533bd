"""Recurrent layers, alone and beside others: checkpoints bring a request's state back with the KV
of just the tokens that it has seen. Through vLLM's own scheduler and KV manager.

P2: no copy reads a state that has changed hands, or that another step has overwritten. P3, P4: what
is restored is what was computed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.kv_groups import KVGroup
from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.entry import Entry
from conserve.engine.checkpoint.pool import HostPool, Worth
from conserve.engine.checkpoint.states import States
from conserve.engine.kv_groups import kv_group_of, kv_groups_of
from tests.engine.copies import ForeignCopyError
from tests.engine.device import VOCABULARY, StaleReadError
from tests.engine.engine import Engine, make_request
from tests.engine.grouped_engine import (
    MISFORTUNES,
    MakeEngine,
    make_grouped,
    stop_and_cancel,
    suffer,
)
from tests.engine.test_checkpoints import run_bursts, totals_of
from tests.engine.test_tight import LENGTHS, MOST_TOKENS, run_tight

pytestmark = pytest.mark.engine

FULL, SLIDING = KVGroup(4), KVGroup(4, window=10)
ONCE, AT_ENDS = KVGroup(512, is_state=True), KVGroup(4, is_state=True)
MODELS = {
    "alone": (ONCE,),
    "alone, at the ends of blocks": (AT_ENDS,),
    "hybrid": (FULL, ONCE, ONCE, ONCE),
    "hybrid, at the ends of blocks": (AT_ENDS, FULL, AT_ENDS),
    "beside a window": (FULL, SLIDING, AT_ENDS),
}
"""Like Mamba, Granite 4, Qwen3-Next; for prefix caching vLLM keeps states at the ends of blocks."""
NUM_BLOCKS = {FULL: 26, SLIDING: 26, AT_ENDS: 5, ONCE: 3}
"""In all, for the requests of a burst to be short of them."""
TIGHT = {FULL: MOST_TOKENS // 4, AT_ENDS: 2, ONCE: 1}
"""What one request takes, if it is the longest."""


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make(
        groups: tuple[KVGroup, ...],
        depth: int = 1,
        *,
        plenty: int = 1,
        num_blocks: int = 0,
        **options: Any,
    ) -> Engine:
        in_all = num_blocks or 1 + plenty * sum(NUM_BLOCKS[group] for group in groups)
        engine = make_grouped(tmp_path, groups, depth, num_blocks=in_all, **options)
        made.append(engine.scheduler)
        return engine

    yield make
    for scheduler in made:
        scheduler.shutdown()


# Blocks


@pytest.mark.parametrize("groups", MODELS.values(), ids=MODELS)
def test_what_requests_lack_is_what_vllm_takes_or_more(
    make_engine: MakeEngine, groups: tuple[KVGroup, ...]
) -> None:
    """They hold no less than is counted as freed when they go, and no more is ever taken than was
    counted as lacking."""
    engine = make_engine(groups, plenty=4)
    scheduler, chance = engine.scheduler, random.Random(3)
    counted = kv_groups_of(scheduler)
    assert counted is not None
    assert [group.is_state for group in counted.groups] == [group.is_state for group in groups]
    for i in range(4):
        prompt = [chance.randrange(1, VOCABULARY) for _ in range(30 + 17 * i)]
        engine.add(make_request(f"r{i}", prompt, 30, online=bool(i % 2), arrival_s=0.0))
    most: dict[str, int] = {}
    while scheduler.has_unfinished_requests():
        engine.step()
        for request in scheduler.running:
            name, computed = request.request_id, request.num_computed_tokens
            managers = scheduler.kv_cache_manager.coordinator.single_type_managers
            tables = [manager.req_to_blocks[name] for manager in managers]
            held = sum(not block.is_null for table in tables for block in table)
            assert counted.blocks_for(computed, computed) <= held
            assert held <= counted.blocks_for(request.num_tokens, 0)
            most[name] = max(most.get(name, 0), held)
    assert len(most) == 4


@pytest.mark.parametrize("mode", ["none", "align"])
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_states_are_counted_as_vllm_keeps_them(mode: str, num_drafts: int) -> None:
    """With drafts it keeps one for each token that a step may end with."""
    import torch
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.single_type_kv_cache_manager import get_manager_for_kv_cache_spec
    from vllm.v1.kv_cache_interface import MambaSpec

    spec = MambaSpec(
        block_size=512 if mode == "none" else 4, shapes=((4,),), dtypes=(torch.float32,),
        mamba_cache_mode=mode, num_speculative_blocks=num_drafts,
    )  # fmt: skip
    group, free = kv_group_of(spec), 64
    manager = get_manager_for_kv_cache_spec(
        kv_cache_spec=spec, max_in_flight_tokens=32, max_model_len=512,
        block_pool=BlockPool(free, enable_caching=mode == "align", hash_block_size=4),
        enable_caching=mode == "align", kv_cache_group_id=0, scheduler_block_size=4,
    )  # fmt: skip
    computed = 0
    for end in (7, 12, 13, 14, 20, 21, 40):
        manager.remove_skipped_blocks("a", computed)
        lacks = manager.get_num_blocks_to_allocate("a", end, [], computed, computed, end)
        before = sum(not block.is_null for block in manager.req_to_blocks["a"])
        assert before + lacks <= group.blocks_for(end, computed)
        manager.allocate_new_blocks("a", end, end)
        held = sum(not block.is_null for block in manager.req_to_blocks["a"])
        assert group.blocks_for(end, end) <= held
        computed = end


# Requests come back as they were


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("groups", MODELS.values(), ids=MODELS)
def test_displaced_requests_come_back_as_they_were(
    make_engine: MakeEngine, groups: tuple[KVGroup, ...], depth: int
) -> None:
    seen: Counter[str] = Counter()
    for seed in range(3):
        engine = make_engine(groups, depth, pace=seed + 1)
        totals = totals_of(engine)
        run_bursts(engine, seed)
        seen.update({name: int(value) for name, value in totals.items()})
    assert seen["displaced_requests"] > 0
    assert seen["restored_tokens memory"] > 0


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("groups", MODELS.values(), ids=MODELS)
def test_stops_and_cancels_beside_copies(
    make_engine: MakeEngine, groups: tuple[KVGroup, ...], depth: int
) -> None:
    stop_and_cancel(make_engine, groups, depth, random.Random(1), (0, 13, 0))


@pytest.mark.parametrize("mode", MISFORTUNES)
@pytest.mark.parametrize("groups", MODELS.values(), ids=MODELS)
def test_whatever_becomes_of_the_copies(
    make_engine: MakeEngine, groups: tuple[KVGroup, ...], mode: str
) -> None:
    suffer(make_engine, groups, mode, num_seeds=2)


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("name", ["hybrid", "hybrid, at the ends of blocks"])
def test_nobody_waits_for_ever_where_memory_holds_one_request(
    make_engine: MakeEngine, name: str, depth: int
) -> None:
    groups = MODELS[name]
    for seed in range(2):
        engine = make_engine(
            groups,
            depth,
            num_blocks=1 + sum(TIGHT[group] for group in groups),
            pace=1 + seed,
            max_num_seqs=2,
            max_step_tokens=64,
        )
        run_tight(engine, seed, lengths=LENGTHS["a block less"], most_steps=2500)


# What is kept of a state


def kept(num_tokens: int, *, state_of: int, groups: tuple[KVGroup, ...] = (FULL, ONCE)) -> HostPool:
    """A pool with so many tokens of request "a", and the state of another number of them."""
    pool = HostPool(100, 4, groups=groups)
    assert pool.grow("a", num_tokens, [], Worth(1.0))
    pool.states.take("a", state_of)
    pool.written("a", num_tokens, [])
    return pool


def test_a_request_is_restored_to_the_token_of_its_state() -> None:
    pool = kept(20, state_of=14)
    assert pool.num_restorable_tokens("a", 20) == 14
    assert pool.num_restorable_tokens("a", 14) == 14
    assert pool.num_restorable_tokens("a", 13) == 0, "no state of it"
    assert {place.group for place in pool.places("a", 4, 14)} == {0, 1}
    (state,) = (place for place in pool.places("a", 4, 14) if place.group == 1)
    assert state.index == 0
    assert [place.index for place in pool.places("a", 4, 14) if not place.group] == [1, 2, 3]


def test_a_state_at_the_ends_of_blocks_is_in_the_block_of_its_last_token() -> None:
    for num_tokens, index in ((1, 0), (4, 0), (5, 1), (16, 3), (17, 4)):
        pool = kept(num_tokens, state_of=num_tokens, groups=(AT_ENDS, FULL, AT_ENDS))
        states = [place for place in pool.places("a", 0, num_tokens) if place.group != 1]
        assert [(place.group, place.index) for place in states] == [(0, index), (2, index)]


def test_a_copy_that_comes_to_nothing_takes_the_state_with_it() -> None:
    pool = kept(20, state_of=20)
    pool.states.lose("a", 16)
    assert pool.num_restorable_tokens("a", 20) == 20
    pool.states.lose("a", 20)
    assert pool.num_restorable_tokens("a", 20) == 0


def test_a_slot_for_each_state_goes_and_comes_with_the_checkpoint() -> None:
    pool = kept(20, state_of=20, groups=(FULL, ONCE, ONCE))
    assert pool.num_used_slots == 5 + 2
    assert pool.lose(place.slot for place in pool.places("a", 16, 20) if place.group == 2) == ["a"]
    assert not pool.num_used_slots


def test_no_room_for_the_state_is_no_room_at_all() -> None:
    pool = HostPool(6, 4, groups=(FULL, ONCE, ONCE))
    assert not pool.grow("a", 20, [], Worth(1.0))
    assert not pool.num_used_slots
    assert pool.grow("a", 16, [], Worth(1.0))


def test_a_state_on_disk_is_given_up_when_its_request_goes_on() -> None:
    """Copies write to memory alone."""
    pool = HostPool(6, 4, num_disk_slots=6, groups=(FULL, ONCE))
    assert pool.grow("a", 16, [], Worth(1.0))
    pool.states.take("a", 16)
    pool.written("a", 16, [])
    assert pool.grow("b", 16, [], Worth(2.0))
    assert len(pool.take_moves()) == 5
    assert pool.num_restorable_tokens("a", 16) == 16
    pool.drop("b")
    assert pool.grow("a", 17, [], Worth(1.0))
    assert pool.num_restorable_tokens("a", 17) == 0
    assert not any(pool.is_on_disk(span.slot) for span in pool.states.take("a", 17))
    pool.drop("a")
    assert not pool.num_used_slots
    assert not pool.num_used_disk_slots


# Negative controls


def restore_without_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: a restore brings tokens back, and leaves out the state."""
    places = HostPool.places

    def careless(self: HostPool, *args: Any) -> Any:
        return [place for place in places(self, *args) if not self.groups[place.group].is_state]

    monkeypatch.setattr(HostPool, "places", careless)


def take_an_older_state_for_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: whatever state was copied once is good for any token."""

    def careless(self: States, request_id: str, num_tokens: int) -> bool:
        entry = self._entries.get(request_id)
        if entry is None or entry.state is None or not entry.state.num_tokens:
            return False
        entry.state.num_tokens = num_tokens
        return True

    monkeypatch.setattr(States, "has", careless)


def restore_to_any_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: where its output is not there yet, a request goes on from a token further back."""
    end_within = Entry.end_within

    def careless(self: Entry, num_tokens: int) -> int:
        if self.state is not None and self.state.num_tokens:
            self.state.num_tokens = num_tokens = max(1, num_tokens - 1)
        return end_within(self, num_tokens)

    monkeypatch.setattr(Entry, "end_within", careless)


def copy_beside_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Careless: the forward that overwrites a state does not wait for its copy."""
    take_orders = Checkpointer.take_orders

    def careless(self: Checkpointer) -> Any:
        orders = take_orders(self)
        orders.wait.clear()
        return orders

    monkeypatch.setattr(Checkpointer, "take_orders", careless)


@pytest.mark.parametrize(
    ("name", "careless"),
    [
        ("alone", restore_without_the_state),
        ("alone", restore_to_any_token),
        ("alone", copy_beside_the_forward),
        ("hybrid", restore_without_the_state),
        ("hybrid", take_an_older_state_for_a_newer_one),
        ("hybrid, at the ends of blocks", take_an_older_state_for_a_newer_one),
        ("hybrid, at the ends of blocks", copy_beside_the_forward),
    ],
)
def test_careless_checkpoints_of_states_are_caught(
    make_engine: MakeEngine, name: str, careless: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    careless(monkeypatch)

    def run_some() -> None:
        for seed in range(12):
            run_bursts(make_engine(MODELS[name], pace=1), seed)

    with pytest.raises((ForeignCopyError, StaleReadError)):
        run_some()
