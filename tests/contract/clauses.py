"""The contract: what must be true of any engine under the policy, whatever is inside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby, pairwise

import pytest

from conserve.core.latency import StepShape
from conserve.core.settings import CHAT_SLOWDOWN, PolicySettings
from conserve.core.snapshot import Targets
from tests.contract.situation import (
    BLOCK_SIZE,
    COST,
    Ask,
    Play,
    Seen,
    SeenStep,
    World,
    mixture,
    offline,
    online,
    particular,
)

Clause = Callable[[Play], None]

SCARCE = World(num_blocks=40, max_running=5)
AMPLE = World(num_blocks=4000, max_running=64, max_step_tokens=512)
EPSILON_S = 1e-9


def everything_adds_up(play: Play) -> None:
    """P0 and P7: every request ends with all its tokens, and none is counted twice or lost."""
    for world in (SCARCE, replace(SCARCE, async_scheduling=True), AMPLE):
        asks = mixture(3)
        seen = play(world, asks)
        assert seen.num_free_blocks == world.num_blocks
        for ask in asks:
            times = seen.token_times_s[ask.name]
            assert len(times) == ask.num_output_tokens, ask
            # Never before it came, and never two at once: a step gives one token.
            assert all(earlier < later for earlier, later in pairwise([ask.arrival_s, *times]))
        granted = dict.fromkeys(seen.asks, 0)
        dropped = 0
        for step in seen.steps:
            dropped += sum(step.grants.values()) if step.stopped else 0
            for name, tokens in step.grants.items():
                granted[name] += 0 if step.stopped else tokens
        needed = {a.name: a.num_prompt_tokens + a.num_output_tokens - 1 for a in asks}
        assert all(granted[name] >= needed[name] for name in granted)
        assert seen.dropped_tokens == dropped
        assert seen.computed_tokens == sum(granted.values())
        assert seen.recomputed_tokens == sum(granted.values()) - sum(needed.values())


def nobody_waits_for_ever(play: Play) -> None:
    """P0 where memory holds one request and no token more: requests of both classes as long as
    memory, with one slot and with several, and with copies that come back meanwhile."""
    whole = 10 * BLOCK_SIZE
    asks = [offline(f"f{i}", 0.0, whole - 7, 8) for i in range(3)]
    for i in range(5):
        prompt = whole - 3 if i % 2 else 9
        asks.append(online(f"o{i}", 0.08 + 0.11 * i, prompt, 4))
    for max_running in (1, 2, 8):
        for link_tokens_per_s in (0.0, 300.0, 1e5):
            for async_scheduling in (False, True):
                world = World(10, max_running, link_tokens_per_s=link_tokens_per_s)
                seen = play(replace(world, async_scheduling=async_scheduling), asks)
                for ask in asks:
                    assert len(seen.token_times_s[ask.name]) == ask.num_output_tokens, ask
                assert seen.num_free_blocks == 10


def one_step_at_a_time(play: Play) -> None:
    """Steps do not overlap, keep the budget of tokens and slots, and stop only where they may."""
    for world in (SCARCE, replace(SCARCE, async_scheduling=True)):
        seen = play(world, mixture(4))
        assert all(a.end_s <= b.start_s + EPSILON_S for a, b in pairwise(seen.steps))
        for step in seen.steps:
            assert 0 < sum(step.grants.values()) <= world.max_step_tokens
            assert len(step.grants) <= world.max_running
            assert step.stoppable or not step.stopped
            first = [name for name in _online_in(seen, step) if step.grants[name] > 1]
            assert not step.stoppable or not first


def online_comes_first(play: Play) -> None:
    """No offline request is admitted while an online one waits, and with room at hand the next
    decision after an arrival serves it."""
    for world in (AMPLE, SCARCE, replace(SCARCE, async_scheduling=True)):
        seen = play(world, mixture(5))
        begun: dict[str, float] = {}
        for step in seen.steps:
            fresh = [seen.asks[name] for name in step.grants if name not in begun]
            for ask in fresh:
                begun[ask.name] = step.start_s
            waits = [a for a in seen.asks.values() if a.online and a.name not in begun]
            # Under async scheduling a step is decided when the one before it starts.
            if not world.async_scheduling and any(a.arrival_s <= step.start_s for a in waits):
                assert all(ask.online for ask in fresh), step
        if world is AMPLE:
            starts = [step.start_s for step in seen.steps]
            for ask in seen.asks.values():
                if ask.online:
                    next_s = min(s for s in starts if s >= ask.arrival_s)
                    assert begun[ask.name] <= next_s, ask


def the_cheapest_makes_room(play: Play) -> None:
    """Whom the arrival displaces: the one that loses least, nobody else, and only if needed."""
    asks = [offline("dear", 0.0, 60, 40), offline("cheap", 0.0, 20, 40), online("o", 0.3, 8)]
    seen = play(World(max_running=2), asks)
    assert seen.displaced == ["cheap"]
    arrived = next(step for step in seen.steps if "o" in step.grants)
    assert "cheap" not in arrived.grants
    before = seen.step_at(0.3)
    assert arrived.start_s == pytest.approx(before.end_s), "at once"
    assert play(World(max_running=3), asks).displaced == []
    # Memory: 24 known tokens of "o" lack blocks that "cheap" alone has enough of.
    asks[-1] = online("o", 0.3, 24)
    seen = play(World(num_blocks=34, max_running=8), asks)
    assert seen.displaced == ["cheap"]


def nobody_yields_to_offline(play: Play) -> None:
    """Online requests are never displaced, and offline ones only for online ones that wait."""
    for seed in range(3):
        seen = play(SCARCE, mixture(seed))
        assert seen.displaced, "else this shows nothing"
        for decision in seen.decisions:
            if decision.plan.displace:
                assert decision.snapshot.waiting_online
                assert all(not seen.asks[name].online for name in decision.plan.displace)


SLACK = Targets(ttft_s=0.2, tbt_s=0.15)
"""Slack enough that steps with online decodes are stopped as well."""
LONG = offline("long", 0.0, 150)
"""A step of 155 ms, if nothing stops it."""


def stops_only_if_needed(play: Play) -> None:
    """An arrival stops a step that it would wait for too long, and no other."""
    stopped, ends = _first_step(play, World(), online("o", 0.02, 8))
    assert stopped
    assert ends == pytest.approx(0.25 * COST.predict_s(_prefill(150))), "at its next safepoint"
    late, whole_s = _first_step(play, World(), online("o", 0.145, 8))
    assert not late, "less than `patience` is left"
    assert whole_s == pytest.approx(COST.predict_s(_prefill(150)))
    assert not _first_step(play, World(), offline("o", 0.02, 8))[0], "offline work is patient"
    patient = World(policy=PolicySettings(patience=1.0))
    assert not _first_step(play, patient, online("o", 0.02, 8))[0], "the target is met anyway"
    strict = replace(patient, targets=Targets(ttft_s=0.1, tbt_s=0.06))
    assert _first_step(play, strict, online("o", 0.02, 8))[0]


def a_step_that_outruns_its_prediction_is_judged_again(play: Play) -> None:
    """An arrival waits for what should be over at once, and no longer than its patience: a step
    that goes on is stopped, though nobody else has come."""
    seconds = COST.predict_s(_prefill(150))
    patience_s = 0.02
    for arrival_s in (seconds - 0.01, seconds + 0.01):
        world = World(held_up={150: 4.0})
        stopped, ends = _first_step(play, world, online("o", arrival_s, 8))
        assert stopped
        assert seconds + patience_s <= ends == pytest.approx(2 * seconds), "at its next safepoint"
    assert not _first_step(play, world, offline("o", 0.16, 8))[0], "nobody waits"
    barely = World(held_up={150: 1 + 0.9 * patience_s / seconds})
    assert not _first_step(play, barely, online("o", seconds - 0.01, 8))[0]


def first_tokens_are_not_stopped(play: Play) -> None:
    asks = [online("first", 0.0, 200, 20), LONG, online("second", 0.02, 8)]
    seen = play(World(), asks)
    assert _online_in(seen, seen.steps[0])
    assert not any(step.stopped for step in seen.steps[:2])


def decodes_are_stopped_while_their_tokens_can_be_in_time(play: Play) -> None:
    """Beside a decode offline work fills half of its slack; the rest is for what follows a stop. A
    long prompt is cut to that, where prompts can be cut."""
    greedy = PolicySettings(chat_slowdown=CHAT_SLOWDOWN["greedy"], patience=0.05)
    before_s = COST.predict_s(_prefill(8))
    for cut, after_s, prompt, stops in (
        (True, 0.01, 8, True),
        (True, 0.01, 170, True),
        (True, 0.085, 8, False),
        (False, 0.01, 8, True),
        (False, 0.01, 170, False),
    ):
        targets = Targets(ttft_s=0.4, tbt_s=0.2)
        world = World(targets=targets, chunked_prefill=cut, policy=greedy)
        work = LONG if cut else offline("long", 0.0, 50)
        asks = [online("first", 0.0, 8, 3), work, online("new", before_s + after_s, prompt)]
        seen = play(world, asks)
        mixed = seen.steps[1]
        assert mixed.stoppable
        assert mixed.grants.keys() == {"first", "long"}
        assert mixed.stopped is stops
        assert all(
            later - earlier <= world.targets.tbt_s
            for earlier, later in pairwise(seen.token_times_s["first"])
        )


def a_stopped_step_leaves_no_trace(play: Play) -> None:
    """P1: from there on all is as if the engine had been idle until then."""
    asks = [offline("a", 0.0, 60, 6), offline("b", 0.0, 30, 6), online("o", 0.01, 12, 3)]
    stopped = play(World(), asks)
    assert [step.stopped for step in stopped.steps[:2]] == [True, False]
    then_s = stopped.steps[0].end_s
    idle = play(World(), [replace(ask, arrival_s=then_s) for ask in asks])
    assert stopped.dropped_tokens == 90
    assert idle.dropped_tokens == 0
    assert stopped.computed_tokens == idle.computed_tokens
    assert stopped.token_times_s == {n: pytest.approx(t) for n, t in idle.token_times_s.items()}
    assert [s.grants for s in stopped.steps[1:]] == [s.grants for s in idle.steps]


def stops_wear_off(play: Play) -> None:
    """Livelock: who was stopped `max_stops` times in a row runs its next step to the end, and as
    nobody can stop that step, it is short."""
    period_s = COST.predict_s(_prefill(60)) / 4 + COST.predict_s(_prefill(8))
    # Each comes as the next offline step has just begun, and is gone before the one after it.
    storm = [online(f"o{i:02}", 0.001 + i * period_s, 8) for i in range(10)]
    world = World()
    seen = play(world, [offline("a", 0.0, 60, 2), *storm])
    mine = [step for step in seen.steps if "a" in step.grants]
    most = world.policy.max_stops
    assert [step.stopped for step in mine[: most + 1]] == [True] * most + [False]
    worn = mine[most]
    assert not worn.stoppable
    limit_s = world.targets.ttft_s * world.policy.unstoppable_share
    assert worn.end_s - worn.start_s <= limit_s + EPSILON_S


def first_come_first_served_within_a_class(play: Play) -> None:
    """Offline work runs in the order it is given (whoever feeds it orders by deadline)."""
    world = World(max_running=2)
    offlines = [offline(f"f{9 - i}", i * 1e-3, 20, 3) for i in range(6)]
    onlines = [online(f"n{9 - i}", 0.1 + i * 1e-3, 20, 3) for i in range(6)]
    seen = play(world, [*offlines, *onlines])
    for asks in (offlines, onlines):
        firsts = [seen.first_token_s(ask.name) for ask in asks]
        assert firsts == sorted(firsts)


def an_instant_has_an_order(play: Play) -> None:
    """A step ends, its blocks are free, who arrives then is known, and only then is decided."""
    end_s = COST.predict_s(_prefill(8))
    asks = [online("early", 0.0, 8), online("late", end_s, 8), offline("off", end_s, 8)]
    seen = play(World(num_blocks=2), asks)
    starts = {next(iter(step.grants)): step.start_s for step in seen.steps}
    assert list(starts) == ["early", "late", "off"]
    assert starts["late"] == end_s
    assert starts["off"] == pytest.approx(2 * end_s)


def offline_tokens_keep_the_tbt_target(play: Play) -> None:
    """P5, as it happened: no step with offline tokens in it made an online token late."""
    world, num_mixed = AMPLE, 0
    for seed in range(3):
        seen = play(world, mixture(seed))
        for step in seen.steps:
            names = _online_in(seen, step)
            due = [t for name in names for t in seen.token_times_s[name] if t < step.end_s]
            if len(names) == len(step.grants) or not due:
                continue
            for name in names:
                before = [t for t in seen.token_times_s[name] if t <= step.start_s]
                if before:
                    num_mixed += 1
                    assert step.end_s - before[-1] <= world.targets.tbt_s + EPSILON_S
    assert num_mixed > 20


def first_tokens_are_taken_apart(play: Play) -> None:
    """What each waited for adds up to the time it took, and is called by its name."""
    for world in (AMPLE, SCARCE, replace(SCARCE, async_scheduling=True)):
        seen = play(world, mixture(6))
        ttfts = [seen.first_token_s(a.name) - a.arrival_s for a in seen.asks.values() if a.online]
        assert sum(map(sum, seen.waits.values())) == pytest.approx(sum(ttfts))
        assert len(seen.waits["prefill"]) == len(ttfts)
    prefill_s, whole_s = (COST.predict_s(_prefill(n)) for n in (8, 150))
    for arrival_s, waits in (
        (0.02, {"stoppable_step": 0.0, "stop": whole_s / 4 - 0.02}),
        (whole_s - 0.01, {"stoppable_step": 0.01, "stop": 0.0}),
    ):
        seen = play(World(), [LONG, online("o", arrival_s, 8)])
        wanted = {**waits, "prefill": prefill_s}
        assert seen.waits == {part: [pytest.approx(s)] for part, s in wanted.items() if s}
    seen = play(World(), [online("o", 0.5, 8)])
    assert seen.waits == {"idle": [0.0], "prefill": [pytest.approx(prefill_s)]}


def stops_keep_the_tbt_target(play: Play) -> None:
    """P5 likewise: the tokens that a stopped step owed come in time from the next."""
    num_owed = 0
    world = replace(AMPLE, targets=SLACK)
    for seed in range(6):
        seen = play(world, mixture(seed))
        for step in seen.steps:
            for name in _online_in(seen, step) if step.stopped else ():
                times = seen.token_times_s[name]
                before_s = max(t for t in times if t <= step.start_s)
                after_s = min(t for t in times if t > step.start_s)
                num_owed += 1
                assert after_s - before_s <= world.targets.tbt_s + EPSILON_S
    assert num_owed > 5


def adapters_are_no_reason_to_wait_behind_offline_work(play: Play) -> None:
    """An arrival of another adapter is in the very next step, and whoever is held back for it goes
    on from where it was; adapters do not take turns from step to step."""
    asks = [replace(offline(f"a{i}", i * 1e-3, 20, 40), adapter=1) for i in range(3)]
    asks += [replace(offline(f"c{i}", 0.01 + i * 1e-3, 20, 12), adapter=3) for i in range(3)]
    asks += [replace(online("b", 0.4, 12, 6), adapter=2), online("none", 1.0, 12, 6)]
    seen = play(replace(AMPLE, max_adapters=1), asks)
    arrived = seen.step_at(0.4)
    assert "a0" in arrived.grants, "else this shows nothing"
    first = next(step for step in seen.steps if "b" in step.grants)
    assert first.start_s == pytest.approx(arrived.end_s)
    assert not seen.displaced
    assert seen.recomputed_tokens == 0
    used = [{seen.asks[name].adapter for name in step.grants} - {0} for step in seen.steps]
    assert all(len(adapters) <= 1 for adapters in used)
    turns = [next(iter(adapters)) for adapters in used if adapters]
    assert [one for one, _ in groupby(turns)] == [1, 2, 1, 3]


def a_requests_own_tbt_target_is_kept(play: Play) -> None:
    """P5 for those that name a shorter target, and for those that name a longer one."""
    num_kept = {"shorter": 0, "longer": 0}
    for seed in range(4):
        seen = play(AMPLE, particular(seed))
        for step in seen.steps:
            names = _online_in(seen, step)
            for name in names if len(names) < len(step.grants) else ():
                target_s = seen.asks[name].tbt_target_s
                before = [t for t in seen.token_times_s[name] if t <= step.start_s]
                if target_s is None or not before:
                    continue
                num_kept["shorter" if target_s < AMPLE.targets.tbt_s else "longer"] += 1
                assert step.end_s - before[-1] <= target_s + EPSILON_S
    assert min(num_kept.values()) > 5, num_kept


def a_step_waits_for_nobody_who_is_due_sooner(play: Play) -> None:
    """A first token that the server's target would have let wait, and its own does not."""
    patient = World(policy=PolicySettings(patience=1.0), targets=Targets(ttft_s=0.2, tbt_s=0.06))
    arrival = online("o", 0.02, 8)
    assert not _first_step(play, patient, arrival)[0]
    assert _first_step(play, patient, replace(arrival, ttft_target_s=0.1))[0]
    hurried = replace(patient, targets=Targets(ttft_s=0.1, tbt_s=0.06))
    assert _first_step(play, hurried, arrival)[0]
    assert not _first_step(play, hurried, replace(arrival, ttft_target_s=0.3))[0]


def those_due_sooner_come_first(play: Play) -> None:
    """Of each class: who names a shorter target overtakes whom it came after."""
    world = World(max_running=1)
    for kind, hurry_s in ((online, 0.2), (offline, 5.0)):
        asks = [kind("first", 0.0, 20, 8)]
        asks += [kind(f"late{i}", 0.01 + i * 1e-3, 20, 2) for i in range(4)]
        asks.append(replace(kind("hurried", 0.02, 20, 2), ttft_target_s=hurry_s))
        asks.append(replace(kind("patient", 0.011, 20, 2), ttft_target_s=1e3))
        seen = play(world, asks)
        order = sorted(seen.asks, key=seen.first_token_s)
        assert order == ["first", "hurried", "late0", "late1", "late2", "late3", "patient"]


CLAUSES: tuple[Clause, ...] = (
    everything_adds_up,
    nobody_waits_for_ever,
    one_step_at_a_time,
    online_comes_first,
    the_cheapest_makes_room,
    nobody_yields_to_offline,
    stops_only_if_needed,
    a_step_that_outruns_its_prediction_is_judged_again,
    first_tokens_are_not_stopped,
    decodes_are_stopped_while_their_tokens_can_be_in_time,
    a_stopped_step_leaves_no_trace,
    stops_wear_off,
    first_come_first_served_within_a_class,
    an_instant_has_an_order,
    offline_tokens_keep_the_tbt_target,
    stops_keep_the_tbt_target,
    adapters_are_no_reason_to_wait_behind_offline_work,
    first_tokens_are_taken_apart,
    a_requests_own_tbt_target_is_kept,
    a_step_waits_for_nobody_who_is_due_sooner,
    those_due_sooner_come_first,
)


def _online_in(seen: Seen, step: SeenStep) -> list[str]:
    return [name for name in step.grants if seen.asks[name].online]


def _prefill(num_tokens: int) -> StepShape:
    shape = StepShape()
    shape.add_prefill(num_tokens, 0)
    return shape


def _first_step(play: Play, world: World, arrival: Ask) -> tuple[bool, float]:
    """Whether LONG's step is stopped by the arrival, and when it ends."""
    step = play(world, [LONG, arrival]).steps[0]
    assert step.stoppable
    return step.stopped, step.end_s
