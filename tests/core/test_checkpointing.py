"""What is copied to the host first, and when a checkpoint is worth bringing back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve.core.checkpointing import (
    choose_copies,
    copies_by_class,
    copy_budget,
    copy_is_quicker,
    tokens_to_restore,
    tokens_worth_waiting_for,
)
from conserve.core.latency import LatencyModel
from conserve.core.snapshot import RequestView, Snapshot

MODEL = LatencyModel(fixed=0.01, per_token=1e-3, per_pair=1e-6)


def running(name: str, computed: int, copied: int = 0, copying: int = 0) -> RequestView:
    return RequestView(
        name,
        False,
        0.0,
        num_tokens=computed + 1,
        num_computed_tokens=computed,
        num_checkpointed_tokens=copied,
        num_copying_tokens=copying,
    )


def copies(*views: RequestView, budget: int, block_size: int = 16, tail: int = 4) -> dict[str, int]:
    return choose_copies(views, budget, block_size, tail)


def test_who_loses_least_is_copied_first() -> None:
    assert copies(running("far", 64), running("near", 64, copied=48), budget=16) == {"near": 64}


def test_copies_under_way_are_not_asked_for_again() -> None:
    assert copies(running("a", 64, copying=64), budget=1000) == {}
    assert copies(running("a", 96, copied=32, copying=64), budget=1000) == {"a": 96}


def test_a_tail_waits_until_enough_of_it_is_new() -> None:
    assert copies(running("a", 34), budget=1000) == {"a": 32}
    assert copies(running("a", 36), budget=1000) == {"a": 36}
    assert copies(running("a", 38, copied=36), budget=1000) == {}
    assert copies(running("a", 40, copied=36), budget=1000) == {"a": 40}


def test_what_the_budget_cannot_pay_stays_for_later() -> None:
    assert copies(running("a", 100), budget=40) == {"a": 32}
    assert copies(running("a", 100), budget=15) == {}


def test_time_earns_copies_and_a_queue_that_grows_stops_them() -> None:
    assert copy_budget(0.1, 1000.0, 0.0) == copy_budget(0.1, 1000.0, 100.0) == 100.0
    assert copy_budget(0.1, 1000.0, 150.0) == 50.0
    assert copy_budget(0.1, 1000.0, 300.0) == 0.0
    assert copy_budget(60.0, 1000.0, 0.0) == 500.0, "a pause earns no more than half a second"
    assert copy_budget(-1.0, 1000.0, 0.0) == 0.0, "a clock that was set back earns nothing"


@settings(derandomize=True, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=5),
    st.integers(0, 500),
    st.sampled_from([1, 4, 16]),
)
def test_copies_stay_within_budget_and_within_what_is_there(
    pairs: list[tuple[int, int]], budget: int, block_size: int
) -> None:
    views = [running(f"r{i}", max(p), copied=min(p)) for i, p in enumerate(pairs)]
    chosen = copies(*views, budget=budget, block_size=block_size, tail=1)
    cost = 0
    for view in views:
        end = chosen.get(view.request_id)
        if end is not None:
            assert view.num_checkpointed_tokens < end <= view.num_computed_tokens
            first = view.num_checkpointed_tokens // block_size
            cost += (-(-end // block_size) - first) * block_size
    assert cost <= budget


def waiting(num_tokens: int, copied: int) -> RequestView:
    return RequestView("w", False, 0.0, num_tokens=num_tokens, num_checkpointed_tokens=copied)


def restored(
    num_tokens: int, copied: int, *, cached: int = 0, rate: float = 1e5, **more: float
) -> int:
    view = waiting(num_tokens, copied)
    return tokens_to_restore(view, cached, MODEL.predict_prefill_s, rate, **more)


def test_a_quick_link_brings_back_all_but_one_token() -> None:
    assert restored(501, 500) == 500
    assert restored(500, 500) == 499


def test_what_the_checkpoint_lacks_is_computed() -> None:
    assert restored(501, 320) == 320


@pytest.mark.parametrize(
    ("why", "found"),
    [
        ("no checkpoints", restored(501, 500, rate=0.0)),
        ("nothing of it", restored(501, 0)),
        ("the device has as much", restored(501, 320, cached=320)),
        ("computing is quicker", restored(501, 500, rate=100.0)),
        ("the link is busy", restored(501, 500, queue_s=10.0)),
    ],
)
def test_nothing_is_brought_back(why: str, found: int) -> None:
    assert found == 0, why


def test_a_copy_is_waited_for_only_if_it_is_quicker() -> None:
    assert copy_is_quicker(16, 16, 400, MODEL, rate=1e4)
    assert not copy_is_quicker(16, 16, 400, MODEL, rate=10.0)
    assert not copy_is_quicker(16, 16, 400, MODEL, rate=0.0)


# Online requests

SCENE = Snapshot(
    now_s=0.0,
    running=(),
    waiting_online=(),
    waiting_offline=(),
    num_free_blocks=100,
    num_free_slots=4,
    block_size=16,
    max_step_tokens=512,
    copy_tail=4,
    restore_tokens_per_s=1e5,
)


def by_class(budget: int, *, copies_online: bool = True) -> dict[str, int]:
    offline = [running("off", 40)]
    online = [replace(running("on", 50), online=True)]
    scene = replace(SCENE, copy_tokens=budget, copies_online=copies_online)
    return copies_by_class(offline, online, scene)


def test_online_requests_get_whole_blocks_of_what_is_left() -> None:
    assert by_class(96) == {"off": 40, "on": 48}
    assert by_class(95) == {"off": 40, "on": 32}
    assert by_class(60) == {"off": 40}
    assert by_class(0) == {}
    assert by_class(96, copies_online=False) == {"off": 40}


@settings(derandomize=True, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), st.booleans()), max_size=6),
    st.integers(0, 500),
    st.sampled_from([1, 4, 16]),
)
def test_copies_of_both_classes_stay_within_one_budget(
    requests: list[tuple[int, int, bool]], budget: int, block_size: int
) -> None:
    views = [
        replace(running(f"r{i}", max(a, b), copying=min(a, b)), online=online)
        for i, (a, b, online) in enumerate(requests)
    ]
    offline, online = ([v for v in views if v.online is kind] for kind in (False, True))
    scene = replace(SCENE, block_size=block_size, copy_tokens=budget, copies_online=True)
    chosen = copies_by_class(offline, online, scene)
    alone = choose_copies(offline, budget, block_size, scene.copy_tail)
    assert {v.request_id: chosen[v.request_id] for v in offline if v.request_id in chosen} == alone
    cost = 0
    for view in views:
        if end := chosen.get(view.request_id):
            first = view.num_copying_tokens // block_size
            cost += (-(-end // block_size) - first) * block_size
            assert not view.online or end % block_size == 0
    assert cost <= budget


def worth_waiting(
    copied: int, *, num_tokens: int = 900, cached: int = 0, step_s: float = 0.01, **more: Any
) -> int:
    view = replace(waiting(num_tokens, copied), online=True, num_computed_tokens=cached)
    return tokens_worth_waiting_for(view, replace(SCENE, **more), MODEL, step_s)


def test_a_conversation_is_waited_for_where_its_first_token_comes_sooner_so() -> None:
    assert worth_waiting(800) == 800
    assert worth_waiting(900) == 899, "one token is left, which yields the next"
    assert worth_waiting(800, cached=400) == 800


@pytest.mark.parametrize(
    ("why", "found"),
    [
        ("nothing of it", worth_waiting(0)),
        ("no link", worth_waiting(800, restore_tokens_per_s=0.0)),
        ("the device has as much", worth_waiting(800, cached=800)),
        ("computing is quicker", worth_waiting(800, restore_tokens_per_s=500.0)),
        ("the link is busy", worth_waiting(800, restore_queue_s=10.0)),
        ("the steps beside it take as long", worth_waiting(800, step_s=0.7)),
        ("little is missing", worth_waiting(800, cached=790)),
    ],
)
def test_a_conversation_is_computed(why: str, found: int) -> None:
    assert found == 0, why
