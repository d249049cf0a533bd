"""The simulator is the engine: same situation, same snapshots, same plans, same steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, Snapshot
from tests.contract import real as engine
from tests.contract import simulated as simulator
from tests.contract.clauses import AMPLE, SCARCE, SLACK
from tests.contract.situation import (
    Ask,
    Decision,
    Seen,
    World,
    mixture,
    particular,
    sessions,
    with_adapters,
)

pytestmark = pytest.mark.engine

VIEWS = ("running", "waiting_online", "waiting_offline")
NARROW = World(num_blocks=64, max_running=3, max_step_tokens=48)
HELD_UP = {num_tokens: 6.0 for num_tokens in range(50, 257) if num_tokens % 4 == 0}
WORLDS = {
    "ample": AMPLE,
    "scarce": SCARCE,
    "narrow": NARROW,
    "ample-async": replace(AMPLE, async_scheduling=True),
    "scarce-async": replace(SCARCE, async_scheduling=True),
    "slack": replace(SCARCE, targets=SLACK),
    "slack-async": replace(SCARCE, targets=SLACK, async_scheduling=True),
    "whole": replace(SCARCE, chunked_prefill=False),
    "whole-async": replace(SCARCE, chunked_prefill=False, async_scheduling=True),
    "held-up": replace(SCARCE, targets=SLACK, held_up=HELD_UP),
    "held-up-async": replace(SCARCE, targets=SLACK, held_up=HELD_UP, async_scheduling=True),
}
MEMORIES = {
    "scarce": replace(SCARCE, num_blocks=60),
    "narrow": NARROW,
    "ample": replace(AMPLE, num_blocks=300),
    "scarce-async": replace(SCARCE, num_blocks=60, async_scheduling=True),
    "slack": replace(SCARCE, num_blocks=60, targets=SLACK),
    "copies": replace(SCARCE, num_blocks=60, link_tokens_per_s=1e5),
    "whole": replace(SCARCE, num_blocks=60, chunked_prefill=False),
}
ADAPTERS = {
    "one": replace(AMPLE, max_adapters=1),
    "two": replace(AMPLE, max_adapters=2),
    "one-scarce-copies": replace(SCARCE, max_adapters=1, link_tokens_per_s=1e5),
    "two-async": replace(SCARCE, max_adapters=2, async_scheduling=True),
}
RATES = {"crawling": 300.0, "slow": 3e3, "fast": 1e5}
"""Tokens a second; computing does 1,000."""


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("seed", range(4))
def test_both_see_decide_and_do_the_same(tmp_path: Path, world: World, seed: int) -> None:
    simulated, real = _play_both(tmp_path, world, mixture(seed))
    assert any(step.stopped for step in real.steps), "else this shows less than it says"
    assert len(simulated.decisions) == len(real.decisions)


@pytest.mark.parametrize("world", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("seed", range(3))
def test_both_share_adapters_the_same(tmp_path: Path, world: World, seed: int) -> None:
    asks = with_adapters(mixture(seed), 3)
    _, real = _play_both(tmp_path, world, asks)
    adapters = [{real.asks[name].adapter for name in step.grants} - {0} for step in real.steps]
    assert max(map(len, adapters)) == world.max_adapters


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("seed", range(2))
def test_both_know_a_requests_own_targets(tmp_path: Path, world: World, seed: int) -> None:
    """No shorter than half of the world's: what the engine's bound lets through."""
    asks = [
        replace(
            ask,
            ttft_target_s=ask.ttft_target_s and max(ask.ttft_target_s, world.targets.ttft_s / 2),
            tbt_target_s=ask.tbt_target_s and max(ask.tbt_target_s, world.targets.tbt_s / 2),
        )
        for ask in particular(seed)
    ]
    simulated, real = _play_both(tmp_path, world, asks)
    assert simulated.token_times_s != simulator.play(world, mixture(seed)).token_times_s
    shown = [view for decision in real.decisions for view in decision.snapshot.running]
    assert {view.tbt_target_s for view in shown if view.online} > {None}


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(4))
def test_both_copy_and_restore_the_same(
    tmp_path: Path, rate: float, async_scheduling: bool, seed: int
) -> None:
    world = replace(SCARCE, link_tokens_per_s=rate, async_scheduling=async_scheduling)
    simulated, _ = _play_both(tmp_path, world, mixture(seed))
    plans = [decision.plan for decision in simulated.decisions]
    assert any(plan.checkpoint for plan in plans)
    assert any(plan.restore for plan in plans) == (rate > 1e3)


@pytest.mark.parametrize("seed", range(2))
def test_both_know_when_a_step_decided_ahead_begins(tmp_path: Path, seed: int) -> None:
    """Somebody comes while the step before it runs, which began sooner than it was expected to, and
    would wait a little less, or more, than may be: 0.02 s."""
    policy = PolicySettings(patience=0.05, prefill_stretch=0.05)
    world = replace(SCARCE, link_tokens_per_s=3e3, async_scheduling=True, policy=policy)
    _play_both(tmp_path, world, mixture(seed))


@pytest.mark.parametrize("class_aware", [True, False], ids=["by-class", "by-age"])
@pytest.mark.parametrize("world", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("seed", range(4))
def test_both_find_and_forget_the_same(
    tmp_path: Path, world: World, seed: int, class_aware: bool
) -> None:
    policy = PolicySettings(class_aware=class_aware, room_weight=1e3, room_min_share=0.1)
    world = replace(world, policy=policy)
    asks = sessions(seed)
    simulated, real = _play_both(tmp_path, world, asks)
    assert simulated.histories == real.histories
    assert simulated.cached_tokens == real.cached_tokens
    found = [ask for ask in asks if simulated.cached_tokens[ask.name]]
    assert any(not ask.online for ask in found)
    assert any(ask.after for ask in found) or not class_aware
    assert any(decision.snapshot.num_remembered_blocks for decision in real.decisions)


def _play_both(folder: Path, world: World, asks: Sequence[Ask]) -> tuple[Seen, Seen]:
    simulated, real = simulator.play(world, asks), engine.play(folder, world, asks)
    _compare_decisions(simulated, real)
    assert len(simulated.steps) == len(real.steps)
    for ours, theirs in zip(simulated.steps, real.steps, strict=True):
        assert ours.grants == theirs.grants
        assert (ours.stoppable, ours.stopped) == (theirs.stoppable, theirs.stopped)
        assert (ours.start_s, ours.end_s) == pytest.approx((theirs.start_s, theirs.end_s))
    assert simulated.token_times_s == {
        name: pytest.approx(times) for name, times in real.token_times_s.items()
    }
    assert simulated.waits.keys() == real.waits.keys()
    for part, waits in simulated.waits.items():
        assert waits == pytest.approx(real.waits[part], abs=1e-9), part
    for counter in ("computed_tokens", "recomputed_tokens", "dropped_tokens", "num_free_blocks"):
        assert getattr(simulated, counter) == getattr(real, counter), counter
    return simulated, real


def _compare_decisions(simulated: Seen, real: Seen) -> None:
    # While a load is under way the engine looks now and then whether it is over.
    lists = [[d for d in seen.decisions if d.does_something] for seen in (simulated, real)]
    for number, (ours, theirs) in enumerate(zip(*lists, strict=False)):
        assert _seen_by(ours) == _approximately(_seen_by(theirs)), f"decision {number}"
        assert ours.plan.grants == theirs.plan.grants, f"decision {number}"
        assert ours.plan.checkpoint == theirs.plan.checkpoint, f"decision {number}"
        assert ours.plan.restore == theirs.plan.restore, f"decision {number}"
        assert ours.plan.displace == theirs.plan.displace, f"decision {number}"
        assert ours.plan.mode is theirs.plan.mode, f"decision {number}"
    assert len(lists[0]) == len(lists[1])


def _seen_by(decision: Decision) -> dict[str, object]:
    """Every value that the policy was shown, by a name that says where."""
    snapshot, shown = decision.snapshot, dict[str, object]()
    for field in fields(Snapshot):
        if field.name not in VIEWS:
            shown[field.name] = getattr(snapshot, field.name)
    for name in VIEWS:
        shown[name] = [view.request_id for view in getattr(snapshot, name)]
        for view in getattr(snapshot, name):
            for field in fields(RequestView):
                shown[f"{view.request_id}.{field.name}"] = getattr(view, field.name)
    for name, value in zip(("fixed", "token"), decision.model.coefficients, strict=False):
        shown[f"model.{name}"] = value
    shown["model.margin"] = decision.model.margin
    return shown


def _approximately(shown: dict[str, object]) -> dict[str, object]:
    return {
        name: pytest.approx(value, abs=1e-9) if isinstance(value, float) else value
        for name, value in shown.items()
    }
