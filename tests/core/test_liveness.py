"""P0 over hundreds of steps of the simulator: every admitted request finishes, whatever arrives."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve.core import invariants
from conserve.core.blocks import blocks_for
from conserve.core.latency import LatencyModel
from conserve.core.plan import Plan
from conserve.core.policy import Planner, decide
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import Snapshot, Targets
from conserve.sim.cost import Machine
from conserve.sim.request import Phase, SimRequest
from tests.core import strategies
from tests.core.careless import (
    ForgetsLeastProgress,
    GivesPromisedBlocksAway,
    KeepsAllForChat,
    StarvesOffline,
    StopsForEver,
    planner_of,
)
from tests.core.simulation import LivelockError, Simulation, offline, online

GPU = LatencyModel(fixed=0.006, per_token=5e-5, per_pair=2e-9, per_context=1e-9, knee=128)
SLOW = LatencyModel(fixed=0.3, per_token=2e-3, margin=0.05)
"""A device whose every step is longer than the default limit of an unstoppable one."""
MACHINE = Machine(num_blocks=100, max_running=8, max_step_tokens=512)


def offline_work(number: int, prompt: int = 300, output: int = 20) -> list[SimRequest]:
    return [offline(f"off-{i}", prompt, output) for i in range(number)]


def online_work(
    number: int, every_s: float, prompt: int = 200, output: int = 10
) -> list[SimRequest]:
    return [online(f"on-{i}", (i + 0.5) * every_s, prompt, output) for i in range(number)]


def are_finished(requests: list[SimRequest]) -> bool:
    return all(request.phase is Phase.FINISHED for request in requests)


def assert_accounts(run: Simulation) -> None:
    """P7: computed = useful + recomputed + dropped by stops, and useful is what was asked for."""
    counters = run.engine.counters
    counters.check()
    assert counters.useful_tokens == sum(request.most_tokens for request in run.finished)
    assert run.engine.places.pool.num_free_blocks == run.machine.num_blocks


@pytest.mark.parametrize("can_stop", [False, True])
@pytest.mark.parametrize("model", [GPU, SLOW], ids=["gpu", "slow"])
def test_offline_work_alone_finishes(model: LatencyModel, can_stop: bool) -> None:
    run = Simulation(model, MACHINE, can_stop=can_stop)
    run.submit(offline_work(12))
    run.run(most_plans=2000)
    assert_accounts(run)


@pytest.mark.parametrize("can_stop", [False, True])
@pytest.mark.parametrize("num_blocks", [21, 30, 60])
def test_scarce_memory_finishes_both_classes(num_blocks: int, can_stop: bool) -> None:
    """21 blocks are one offline request and not a token more."""
    machine = replace(MACHINE, num_blocks=num_blocks, max_running=4)
    run = Simulation(GPU, machine, can_stop=can_stop)
    run.submit([*offline_work(6), *online_work(40, every_s=0.15)])
    run.run(most_plans=8000)
    assert_accounts(run)


def test_a_single_slot_finishes_both_classes_on_a_slow_device() -> None:
    """Memory for one request only, and limits shorter than any step."""
    run = Simulation(SLOW, replace(MACHINE, num_blocks=20, max_running=1))
    run.submit([*offline_work(3, prompt=290, output=4), *online_work(5, every_s=20.0)])
    run.run(most_plans=2000)
    assert_accounts(run)


def adverse(planner: Planner = decide, *, check: bool = True) -> Simulation:
    """Somebody arrives in the middle of every step that may be stopped.

    One-token answers and no stretch: offline work gets nothing but steps of its own.
    """
    return Simulation(
        replace(GPU, knee=0.0),
        replace(MACHINE, safepoint_layers=4),  # a step that looks only once would get through
        can_stop=True,
        settings=PolicySettings(patience=0.0, prefill_stretch=0.0),
        intrude=True,
        planner=planner,
        check=check,
    )


def test_online_arrivals_without_end_do_not_stop_offline_work_for_ever() -> None:
    run, work = adverse(), offline_work(4)
    run.submit(work)
    run.run(most_plans=4000, until=lambda: are_finished(work))
    assert run.num_intruders > 50
    assert run.engine.counters.dropped_tokens > 0
    # Whoever was stopped max_stops times in a row was let through.
    assert max(request.num_stops for request in work) <= PolicySettings().max_stops


def test_stopping_a_request_for_ever_is_caught() -> None:
    run, work = adverse(planner_of(StopsForEver), check=False), offline_work(4)
    run.submit(work)
    with pytest.raises(LivelockError, match="P0"):
        run.run(most_plans=4000, until=lambda: are_finished(work))


def test_resident_online_decodes_without_end_leave_their_slack_to_offline_work() -> None:
    """A new online request arrives before the last one is done, for ever."""
    targets = Targets(ttft_s=1.0, tbt_s=0.1)
    run = Simulation(GPU, replace(MACHINE, num_blocks=200), targets=targets)
    work, chats = offline_work(6), online_work(2000, every_s=0.4, output=40)
    run.submit([*work, *chats])
    run.run(most_plans=20_000, until=lambda: are_finished(work))
    assert chats[-1].arrival_s > run.engine.now_s, "the online traffic was to outlast the work"


def is_served_without_slack(floor: float) -> bool:
    """Whether an offline request gets through beside a resident online one."""
    # With a TBT target shorter than a step with one more decode, nothing is left over.
    tight = replace(GPU, per_decode=5e-3)
    targets = Targets(ttft_s=0.1, tbt_s=0.018, offline_floor=floor)
    run = Simulation(tight, replace(MACHINE, num_blocks=200), targets=targets)
    work = offline_work(1, prompt=64, output=8)
    run.submit([online("on", 0.0, 64, 2000), *work])
    run.run(most_plans=1000, until=lambda: run.num_plans == 1000)
    return are_finished(work)


def test_the_floor_gets_offline_work_through_where_online_work_leaves_no_slack() -> None:
    assert not is_served_without_slack(floor=0.0)
    assert is_served_without_slack(floor=0.3)


@pytest.mark.parametrize("policy", [ForgetsLeastProgress, StarvesOffline])
def test_work_that_gets_nothing_is_caught(policy: type[ForgetsLeastProgress]) -> None:
    for planner in (decide, planner_of(policy)):
        slow = LatencyModel(fixed=0.01, per_token=1e-3)
        targets, machine = Targets(ttft_s=0.01), replace(MACHINE, num_blocks=40)
        run = Simulation(slow, machine, targets=targets, planner=planner, check=planner is decide)
        run.submit(offline_work(3, prompt=200, output=4))
        if planner is decide:
            run.run(most_plans=3000)
        else:
            with pytest.raises(LivelockError, match="P0"):
                run.run(most_plans=3000)


def run_scarce(planner: Planner, *, check: bool = True) -> Simulation:
    machine = replace(MACHINE, num_blocks=36, max_step_tokens=200)
    run = Simulation(GPU, machine, planner=planner, check=check)
    run.submit(offline_work(8, prompt=320, output=8))
    run.run(most_plans=2000)
    assert_accounts(run)
    return run


def test_admission_keeps_the_blocks_it_promised() -> None:
    """A prompt that is half in place already owns the blocks of its other half."""
    run = run_scarce(decide)
    counters = run.engine.counters
    assert counters.num_preempted == counters.recomputed_tokens == run.num_refused == 0


def test_promises_not_kept_are_caught() -> None:
    """Whom a policy starts on promised blocks finds them taken: the engine cannot let it in."""
    assert run_scarce(planner_of(GivesPromisedBlocksAway), check=False).num_refused > 0


def remembering_everything(planner: Planner) -> Planner:
    """All of memory is worth more as chat's history."""

    def plan(snapshot: Snapshot, model: LatencyModel, settings: PolicySettings) -> Plan:
        snapshot = replace(snapshot, num_remembered_blocks=10**6)
        plan = planner(snapshot, model, settings)
        if planner is decide:
            invariants.check(snapshot, plan, model, settings)
        return plan

    return plan


def run_beside_chat(planner: Planner) -> Simulation:
    run = Simulation(GPU, MACHINE, planner=remembering_everything(planner), check=False)
    run.submit([*offline_work(5), *online_work(10, every_s=0.5)])
    run.run(most_plans=3000)
    return run


def test_offline_work_gets_on_whatever_chat_has_to_remember() -> None:
    assert_accounts(run_beside_chat(decide))


def test_a_room_that_spares_nobody_is_caught() -> None:
    with pytest.raises(LivelockError, match="P0"):
        run_beside_chat(planner_of(KeepsAllForChat))


@st.composite
def scenarios(draw: st.DrawFn) -> Simulation:
    """A random engine with barely enough memory for its largest request, and its work."""
    prompts, outputs = st.integers(1, 300), st.integers(1, 12)
    num_offline = draw(st.integers(1, 6))
    work = [offline(f"off-{i}", draw(prompts), draw(outputs)) for i in range(num_offline)]
    arrival_s = 0.0
    for i in range(draw(st.integers(0, 8))):
        arrival_s += draw(st.floats(0.0, 2.0))
        work.append(online(f"on-{i}", arrival_s, draw(prompts), draw(outputs)))
    block_size = draw(st.sampled_from([1, 16]))
    largest = max(blocks_for(request.most_tokens, block_size) for request in work)
    max_step_tokens = draw(st.sampled_from([16, 512]))
    machine = Machine(
        num_blocks=largest + draw(st.integers(0, largest)),
        block_size=block_size,
        max_running=draw(st.integers(1, 4)),
        max_step_tokens=max_step_tokens,
        # Prompts that are computed whole are no longer than a step.
        chunked_prefill=max_step_tokens == 16 or draw(st.booleans()),
        kv_bytes_per_token=1,
        link_bytes_per_s=draw(st.sampled_from([0.0, 300.0, 1e5])),
    )
    run = Simulation(
        draw(strategies.models()),
        machine,
        settings=draw(strategies.settings()),
        targets=Targets(ttft_s=draw(st.sampled_from([0.05, 1.0])), tbt_s=0.1),
        can_stop=draw(st.booleans()),
        async_scheduling=draw(st.booleans()),
    )
    run.submit(work)
    return run


@settings(max_examples=400)
@given(scenarios())
def test_every_admitted_request_finishes(run: Simulation) -> None:
    num_tokens = sum(request.most_tokens for request in run.submitted)
    run.run(most_plans=200 + 10 * num_tokens)
    assert_accounts(run)
