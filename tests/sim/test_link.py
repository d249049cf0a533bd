"""The host link: when a copy counts, who waits for it, and what a restored request owes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import replace

import pytest

from conserve.core.latency import LatencyModel
from conserve.core.plan import Mode, Plan
from conserve.core.policy import decide
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import Snapshot
from conserve.sim.engine import Engine
from conserve.sim.link import HostLink, Load
from conserve.sim.places import Places
from conserve.sim.request import Phase, SimRequest
from conserve.sim.schedulers import ConserveScheduler
from conserve.sim.state import EngineState
from conserve.sim.step import Step
from tests.sim.sim_world import (
    COST,
    MACHINE,
    SMALL,
    TARGETS,
    CheckedScheduler,
    audit,
    run,
    submit_all,
    workload,
)

SLOW, FAST = 2e6, 1e9
"""Bytes a second: 2,000 and 1,000,000 tokens."""


def _offline(name: str, computed: int, *, prompt: int = 500) -> SimRequest:
    request = SimRequest.arriving(
        name, online=False, arrival_s=0.0, num_prompt_tokens=prompt, num_output_tokens=20
    )
    request.phase = Phase.RUNNING
    request.num_computed_tokens = computed
    return request


def _link(bytes_per_s: float = SLOW) -> HostLink:
    return HostLink(replace(MACHINE, link_bytes_per_s=bytes_per_s))


def _begin(link: HostLink, now_s: float) -> tuple[float, list[Load]]:
    """A plan has been applied, and its step begins."""
    link.close_orders()
    return link.begin(now_s)


# The link alone


def test_a_copy_counts_when_the_link_has_carried_it() -> None:
    link, request = _link(), _offline("a", 100)
    link.order({"a": 96}, {"a": request})
    assert (request.num_checkpointed_tokens, request.num_copying_tokens) == (0, 96)
    link.advance(100.0)
    assert request.num_checkpointed_tokens == 0, "its step has not begun"
    assert _begin(link, 100.0) == (100.0, [])
    link.advance(100.0 + 95 / 2000)
    assert request.num_checkpointed_tokens == 0
    link.advance(100.0 + 97 / 2000)
    assert request.num_checkpointed_tokens == 96
    assert link.num_checkpointed_tokens == 96


def test_copies_and_restores_go_one_after_the_other_in_whole_blocks() -> None:
    link, requests = _link(), {name: _offline(name, 100) for name in "abc"}
    link.order({"a": 33, "b": 16}, requests)
    link.load(requests["c"], 32, 50)
    assert link.restore_queue_s == pytest.approx(32 / 2000)
    _, loads = _begin(link, 0.0)
    (load,) = loads
    assert load.request is requests["c"]
    assert load.done_s == pytest.approx((48 + 16 + 32) / 2000)
    link.loaded(requests["c"])
    assert link.restore_queue_s == 0.0
    assert link.num_restored_tokens == 18


def test_the_next_step_waits_for_what_a_leaving_request_lacks() -> None:
    link, request = _link(FAST), _offline("a", 100)
    link.order({"a": 64}, {"a": request})
    _begin(link, 0.0)
    link.leaves(request, COST)
    assert request.num_checkpointed_tokens == 100, "a restore is queued behind the copy"
    ready_s, _ = _begin(link, 0.0)
    assert ready_s == pytest.approx((64 + 48) / 1e6)
    link.advance(ready_s)
    assert request.num_landed_tokens == 100


def test_a_copy_that_takes_longer_than_computing_is_given_up() -> None:
    link, request = _link(1e4), _offline("a", 100)
    link.order({"a": 64}, {"a": request})
    _begin(link, 0.0)
    link.leaves(request, COST)
    assert request.num_checkpointed_tokens == request.num_copying_tokens == 0
    ready_s, _ = _begin(link, 1.0)
    assert ready_s == pytest.approx(6.4), "it reads the blocks until then"
    link.advance(ready_s)
    assert request.num_landed_tokens == link.num_checkpointed_tokens == 0


def test_what_is_dropped_behind_a_decided_step_holds_up_the_one_after_it() -> None:
    link, request = _link(), _offline("a", 100)
    link.order({"a": 96}, {"a": request})
    link.close_orders()
    link.finished(request)
    assert link.begin(0.0) == (0.0, []), "the blocks are free for the plan that comes next"
    assert _begin(link, 0.01)[0] == pytest.approx(96 / 2000)
    link.advance(1.0)
    assert link.num_checkpointed_tokens == link.num_queued_tokens == 0


def test_an_idle_link_delays_no_step_whatever_the_time() -> None:
    assert _begin(_link(), -8.0) == (-8.0, [])


def test_what_may_be_copied_is_earned_by_time() -> None:
    link, request = _link(), _offline("a", 3000, prompt=4000)
    assert link.copy_tokens(10.0) == 0
    assert link.copy_tokens(10.25) == 125
    assert link.copy_tokens(20.25) == 250, "no pause earns more than half a second"
    link.order({"a": 496}, {"a": request})
    assert link.copy_tokens(30.25) == 4, "so much is queued already"
    _begin(link, 30.25)
    assert link.copy_tokens(40.25) == 250
    assert HostLink(MACHINE).copy_tokens(1.0) == 0


# In the engine


class _Witness(CheckedScheduler):
    """Knows from outside what was computed when, and looks at every request before each plan."""

    def __init__(self, tokens_per_s: float) -> None:
        super().__init__(COST, TARGETS)
        self.least_s = MACHINE.block_size / tokens_per_s
        self.num_looks = self.num_held = self.most_owed = 0
        self.computed: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)

    def plan(self, places: Places, now_s: float) -> Plan:
        places.link.advance(now_s)
        for request in places.live.values():
            if landed := request.num_landed_tokens:
                self.num_looks += 1
                made_s = next(t for t, end in self.computed[request.request_id] if end >= landed)
                assert made_s + self.least_s <= now_s + 1e-9, "it cannot have been carried yet"
        for request in places.holding:
            self.num_held += 1
            owed = request.num_lost_tokens - request.num_computed_tokens
            self.most_owed = max(self.most_owed, owed)
        return super().plan(places, now_s)

    def snapshot(self, places: Places, now_s: float) -> Snapshot:
        shown = super().snapshot(places, now_s)
        views = (*shown.running, *shown.waiting_online, *shown.waiting_offline)
        assert not set(views) & set(places.restoring)
        return shown


def _drain(
    seed: int, rate: float, *, async_scheduling: bool = False, num_offline: int = 100
) -> tuple[Engine, _Witness]:
    """Offline and online requests to the very end, with every look of the witness."""
    witness = _Witness(rate / MACHINE.kv_bytes_per_token)
    work = workload(seed)
    work.offline[num_offline:] = []
    ends: dict[int, dict[str, int]] = {}

    class _Recorded(EngineState):
        def apply(
            self,
            plan: Plan,
            model: LatencyModel | None = None,
            kept: Container[str] = (),
        ) -> Step:
            step = super().apply(plan, model, kept)
            ends[id(step)] = {n: self.places.live[n].num_computed_tokens for n in step.grants}
            return step

    def on_step(step: Step) -> None:
        for name, end in ends.pop(id(step)).items():
            if not step.stopped:
                witness.computed[name].append((step.end_s, end))

    machine = replace(SMALL, link_bytes_per_s=rate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conserve.sim.engine.EngineState", _Recorded)
        engine = Engine(machine, COST, witness, async_scheduling=async_scheduling, on_step=on_step)
    submit_all(engine, work)
    engine.run()
    audit(engine.places)
    assert not engine.places.live
    engine.link.advance(float("inf"))
    assert engine.places.pool.num_free_blocks == SMALL.num_blocks
    assert not engine.link.has_orders
    assert engine.link.restore_queue_s == 0.0
    assert engine.link.num_queued_tokens == 0
    engine.counters.check()
    return engine, witness


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("rate", [SLOW, FAST])
def test_nothing_is_on_the_host_before_it_was_computed_and_carried(
    rate: float, async_scheduling: bool
) -> None:
    engine, witness = _drain(1, rate, async_scheduling=async_scheduling)
    assert witness.num_looks > 100
    assert engine.counters.checkpointed_tokens > 0


def _at_once(self: HostLink, wanted: Mapping[str, int], live: Mapping[str, SimRequest]) -> None:
    for name, end in wanted.items():
        live[name].num_landed_tokens = live[name].num_copying_tokens = end
        live[name].num_checkpointed_tokens = end


def test_copies_that_count_at_once_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostLink, "order", _at_once)
    with pytest.raises(AssertionError, match="carried yet"):
        _drain(1, SLOW)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_restored_request_computes_at_most_one_token_again(seed: int) -> None:
    engine, witness = _drain(seed, FAST)
    assert engine.counters.restored_tokens > 0
    assert witness.num_held > 0
    assert witness.most_owed <= 1


def test_a_tail_that_is_left_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conserve.sim.link.copy_is_quicker", lambda *_: False)
    _, witness = _drain(1, FAST)
    assert witness.most_owed > 1


def test_a_link_too_slow_to_help_changes_nothing_that_is_computed() -> None:
    for seed in (1, 2, 3):
        slow = run(seed, num_blocks=150, max_running=12, link_bytes_per_s=1e3).counters
        without = run(seed, num_blocks=150, max_running=12).counters
        assert slow.restored_tokens == slow.checkpointed_tokens == 0
        assert slow.num_displaced > 0
        assert slow.recomputed_tokens == without.recomputed_tokens > 0


class _Audited(ConserveScheduler):
    def plan(self, places: Places, now_s: float) -> Plan:
        audit(places)
        return super().plan(places, now_s)


def test_whoever_is_restored_may_have_to_give_the_blocks_back() -> None:
    """The planner takes them from the first five that wait with theirs."""
    given: list[str] = []
    shown_again: list[int] = []

    def planner(snapshot: Snapshot, model: LatencyModel, settings: PolicySettings) -> Plan:
        waiting = {r.request_id: r.num_blocks for r in snapshot.waiting_offline}
        if len(given) > len(shown_again):
            shown_again.append(waiting[given[-1]])
        held = [name for name, num_blocks in waiting.items() if num_blocks]
        if held and len(given) < 5:
            given.append(held[0])
            return Plan(Mode.IDLE, displace=held[:1])
        return decide(snapshot, model, settings)

    scheduler = _Audited(COST, TARGETS)
    scheduler.planner = planner
    engine = Engine(replace(SMALL, link_bytes_per_s=FAST), COST, scheduler)
    work = workload(1)
    work.offline[100:] = []
    requests = submit_all(engine, work)
    engine.run()
    audit(engine.places)
    assert shown_again == [0] * 5
    assert all(request.phase is Phase.FINISHED for request in requests)
    assert engine.places.pool.num_free_blocks == SMALL.num_blocks
    engine.counters.check()
