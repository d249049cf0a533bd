"""P0 over hundreds of steps: every admitted request finishes, whatever arrives."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve.core.blocks import blocks_for
from conserve.core.latency import LatencyModel
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import Targets
from tests.core import strategies
from tests.core.engine_model import Engine, Job

GPU = LatencyModel(fixed=0.006, per_token=5e-5, per_pair=2e-9, per_context=1e-9, knee=128)
SLOW = LatencyModel(fixed=0.3, per_token=2e-3, margin=0.05)
"""A device whose every step is longer than the default limit of an unstoppable one."""


def offline_jobs(number: int, prompt: int = 300, output: int = 20) -> list[Job]:
    return [Job(f"off-{i}", False, 0.0, prompt, output) for i in range(number)]


def online_jobs(number: int, every_s: float, prompt: int = 200, output: int = 10) -> list[Job]:
    return [Job(f"on-{i}", True, (i + 0.5) * every_s, prompt, output) for i in range(number)]


def assert_accounts(engine: Engine) -> None:
    """P7: computed = useful + recomputed + dropped by stops."""
    useful = sum(job.prompt + job.output - 1 for job in engine.finished)
    assert engine.granted == useful + engine.recomputed + engine.dropped


@pytest.mark.parametrize("can_stop", [False, True])
@pytest.mark.parametrize("model", [GPU, SLOW], ids=["gpu", "slow"])
def test_offline_work_alone_finishes(model: LatencyModel, can_stop: bool) -> None:
    engine = Engine(model, num_blocks=100, can_stop=can_stop)
    engine.submit(offline_jobs(12))
    engine.run(max_steps=2000)
    assert len(engine.finished) == 12
    assert_accounts(engine)


@pytest.mark.parametrize("can_stop", [False, True])
@pytest.mark.parametrize("num_blocks", [21, 30, 60])
def test_scarce_memory_finishes_both_classes(num_blocks: int, can_stop: bool) -> None:
    """21 blocks are one offline request and not a token more."""
    engine = Engine(GPU, num_blocks=num_blocks, num_slots=4, can_stop=can_stop)
    engine.submit(offline_jobs(6))
    engine.submit(online_jobs(40, every_s=0.15))
    engine.run(max_steps=8000)
    assert len(engine.finished) == 46
    assert_accounts(engine)


def test_a_single_slot_finishes_both_classes_on_a_slow_device() -> None:
    """Memory for one request only, and limits shorter than any step."""
    engine = Engine(SLOW, num_blocks=20, num_slots=1)
    engine.submit(offline_jobs(3, prompt=290, output=4))
    engine.submit(online_jobs(5, every_s=20.0))
    engine.run(max_steps=2000)
    assert len(engine.finished) == 8


def test_online_arrivals_without_end_do_not_stop_offline_work_for_ever() -> None:
    """Somebody arrives in the middle of every step that may be stopped.

    One-token answers and no stretch: offline work gets nothing but steps of its own.
    """
    count = 0

    def intrude(engine: Engine, step_s: float) -> Job:
        nonlocal count
        count += 1
        return Job(f"on-{count}", True, engine.now_s + step_s / 2, prompt=32, output=1)

    engine = Engine(
        replace(GPU, knee=0.0),
        num_blocks=100,
        can_stop=True,
        adversary=intrude,
        settings=PolicySettings(patience=0.0, prefill_stretch=0.0),
    )
    jobs = offline_jobs(4)
    engine.submit(jobs)
    engine.run(max_steps=4000, until=lambda: all(job.finished for job in jobs))
    assert count > 50
    assert engine.dropped > 0
    # Whoever was stopped max_stops times in a row was let through.
    assert max(job.stops for job in jobs) <= PolicySettings().max_stops


def test_resident_online_decodes_without_end_leave_their_slack_to_offline_work() -> None:
    """A new online request arrives before the last one is done, for ever."""
    engine = Engine(GPU, num_blocks=200, targets=Targets(ttft_s=1.0, tbt_s=0.1))
    jobs = offline_jobs(6)
    engine.submit(jobs)
    engine.submit(online_jobs(2000, every_s=0.4, output=40))
    engine.run(max_steps=20_000, until=lambda: all(job.finished for job in jobs))
    assert engine.future, "the online traffic was to outlast the offline work"


def test_the_floor_gets_offline_work_through_where_online_work_leaves_no_slack() -> None:
    # With a TBT target shorter than a step with one more decode, nothing is left over.
    tight = replace(GPU, per_decode=5e-3)
    served = {}
    for floor in (0.0, 0.3):
        targets = Targets(ttft_s=0.1, tbt_s=0.018, offline_floor=floor)
        engine = Engine(tight, num_blocks=200, targets=targets)
        jobs = offline_jobs(1, prompt=64, output=8)
        engine.submit([Job("on", True, 0.0, 64, 2000), *jobs])
        for _ in range(1000):
            engine.step()
        served[floor] = jobs[0].finished
    assert served == {0.0: False, 0.3: True}


def test_admission_keeps_the_blocks_it_promised() -> None:
    """A prompt that is half in place already owns the blocks of its other half."""
    engine = Engine(GPU, num_blocks=36, max_step_tokens=200)
    engine.submit(offline_jobs(8, prompt=320, output=8))
    engine.run(max_steps=2000)
    assert len(engine.finished) == 8
    assert engine.num_taken == 0
    assert engine.recomputed == 0


def test_one_seed_has_one_trace() -> None:
    traces = []
    for _ in range(2):
        engine = Engine(GPU, num_blocks=40, can_stop=True)
        engine.submit(offline_jobs(5))
        engine.submit(online_jobs(20, every_s=0.07))
        engine.run(max_steps=3000)
        finished = [(job.name, job.last_token_s) for job in engine.finished]
        traces.append((engine.num_steps, engine.now_s, engine.dropped, finished))
    assert traces[0] == traces[1]


@st.composite
def scenarios(draw: st.DrawFn) -> Engine:
    """A random engine with barely enough memory for its largest request, and its work."""
    prompts, outputs = st.integers(1, 300), st.integers(1, 12)
    num_offline = draw(st.integers(1, 6))
    jobs = [Job(f"off-{i}", False, 0.0, draw(prompts), draw(outputs)) for i in range(num_offline)]
    arrival_s = 0.0
    for i in range(draw(st.integers(0, 8))):
        arrival_s += draw(st.floats(0.0, 2.0))
        jobs.append(Job(f"on-{i}", True, arrival_s, draw(prompts), draw(outputs)))
    block_size = draw(st.sampled_from([1, 16]))
    largest = max(blocks_for(job.prompt + job.output, block_size) for job in jobs)
    engine = Engine(
        draw(strategies.models()),
        num_blocks=largest + draw(st.integers(0, largest)),
        num_slots=draw(st.integers(1, 4)),
        block_size=block_size,
        max_step_tokens=draw(st.sampled_from([16, 512])),
        settings=draw(strategies.settings()),
        targets=Targets(ttft_s=draw(st.sampled_from([0.05, 1.0])), tbt_s=0.1),
        can_stop=draw(st.booleans()),
        checkpoints=draw(st.booleans()),
    )
    engine.submit(jobs)
    return engine


@settings(max_examples=400)
@given(scenarios())
def test_every_admitted_request_finishes(engine: Engine) -> None:
    number = len(engine.future)
    total = sum(job.prompt + job.output for job in engine.future)
    engine.run(max_steps=200 + 10 * total)
    assert len(engine.finished) == number
    assert_accounts(engine)
