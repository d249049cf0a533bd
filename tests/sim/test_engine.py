"""Conservation, determinism and liveness of the simulated engine."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from conserve.core.looks import COMPARE_EVERY, LEAST_LOOKS, LEAST_SEEN, SHORT_S
from conserve.metrics import write_records
from conserve.sim.arms import ARMS
from conserve.sim.chrometrace import write_trace
from conserve.sim.cost import Machine
from conserve.sim.engine import Engine
from conserve.sim.request import Phase
from conserve.sim.schedulers import Scheduler
from conserve.sim.state import EngineState
from conserve.sim.step import Step
from conserve.sim.stock import StockScheduler
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


def _drain(
    scheduler: Scheduler,
    seed: int,
    machine: Machine = SMALL,
    *,
    async_scheduling: bool = False,
    strict_classes: bool = True,
) -> Engine:
    """Run 150 offline requests and the online ones of a seed to the very end."""
    work = workload(seed)
    work.offline[150:] = []
    engine = Engine(
        machine,
        COST,
        scheduler,
        seed=seed,
        async_scheduling=async_scheduling,
        strict_classes=strict_classes,
    )
    requests = submit_all(engine, work)
    engine.run()
    audit(engine.places)
    assert not engine.places.live
    for request in requests:
        assert request.phase is Phase.FINISHED
        assert len(request.token_times_s) == request.num_output_tokens
        assert request.num_tokens == request.most_tokens
        times = [request.arrival_s, *request.token_times_s]
        assert all(earlier < later for earlier, later in pairwise(times))
    return engine


@pytest.mark.parametrize("gap_s", [0.0, 0.0005, 0.003])
def test_the_gap_behind_a_stoppable_step_is_learned(gap_s: float) -> None:
    scheduler = CheckedScheduler(COST, TARGETS)
    machine = replace(MACHINE, gap_s=gap_s)
    _drain(scheduler, 2, machine, async_scheduling=True)
    assert scheduler.experience.stop_gap.seconds == pytest.approx(gap_s, rel=1e-3)


def test_a_gap_behind_every_step_is_no_price_of_stops() -> None:
    scheduler = CheckedScheduler(COST, TARGETS)
    _drain(scheduler, 1, replace(MACHINE, gap_s=0.003))
    assert scheduler.experience.stop_gap.seconds == 0.0


@pytest.mark.parametrize("link", [0.0, 2e6, 1e9])
@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_request_finishes_and_every_token_is_accounted_for(
    seed: int, async_scheduling: bool, link: float
) -> None:
    scheduler = CheckedScheduler(COST, TARGETS)
    machine = replace(SMALL, link_bytes_per_s=link, noise=0.05, gap_s=0.0005)
    engine = _drain(scheduler, seed, machine, async_scheduling=async_scheduling)
    counters = engine.counters
    counters.check()
    # Every token's KV is needed once, but that of the last token never.
    needed = sum(p.num_prompt_tokens + p.num_output_tokens - 1
                 for p in (*workload(seed).online, *workload(seed).offline[:150]))  # fmt: skip
    assert counters.useful_tokens == needed
    assert scheduler.num_plans > 100
    assert counters.num_displaced > 0
    assert engine.places.pool.num_free_blocks == SMALL.num_blocks


@pytest.mark.parametrize("by_class", [False, True])
def test_stock_arms_conserve_too(by_class: bool) -> None:
    engine = _drain(StockScheduler(by_class=by_class), 1, strict_classes=by_class)
    engine.counters.check()
    assert engine.counters.num_preempted > 0
    assert engine.counters.dropped_tokens == 0


class _Leaky(EngineState):
    """A careless engine: a stopped step's grants are not taken back."""

    def drop(self, step: Step) -> None:
        step.producers.clear()
        super().drop(step)
        for request_id, tokens in step.grants.items():
            self.places.live[request_id].num_computed_tokens += tokens


def test_a_stopped_step_that_leaves_a_trace_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the checks above must be able to fail."""
    monkeypatch.setattr("conserve.sim.engine.EngineState", _Leaky)
    with pytest.raises(AssertionError):
        _drain(
            CheckedScheduler(COST, replace(TARGETS, ttft_s=0.05)), 1, replace(SMALL, num_blocks=900)
        )


def test_a_stopped_step_leaves_no_trace_and_ends_at_a_safepoint() -> None:
    steps: list[Step] = []
    outcome = run(2, targets=replace(TARGETS, ttft_s=0.05), on_step=steps.append)
    stopped = [step for step in steps if step.stopped]
    assert len(stopped) == outcome.counters.num_stopped_steps > 5
    for step in stopped:
        spacing = step.layers_between_looks / MACHINE.num_layers
        looks = (step.end_s - step.start_s) / (step.seconds * spacing)
        assert looks == pytest.approx(round(looks), abs=1e-6)
        assert step.stoppable
        assert step.num_online_tokens <= step.online_shape.num_decodes
    assert outcome.counters.dropped_tokens == sum(s.shape.num_tokens for s in stopped)


def test_stopped_steps_give_no_tokens() -> None:
    steps: list[Step] = []
    outcome = run(2, targets=replace(TARGETS, ttft_s=0.05), on_step=steps.append)
    ends = {step.end_s for step in steps if not step.stopped}
    for record in outcome.records:
        assert ends.issuperset(record.token_times_s)


def test_steps_do_not_overlap_and_every_gap_is_kept() -> None:
    steps: list[Step] = []
    run(1, on_step=steps.append, gap_s=0.001)
    for earlier, later in pairwise(steps):
        assert later.start_s >= earlier.end_s + 0.001 - 1e-12


def test_async_scheduling_hides_the_gap() -> None:
    """But behind steps that can be stopped: nothing is decided while one runs."""
    synchronous = run(1, "conserve-no-stop", gap_s=0.005).counters
    overlapped = run(1, "conserve-no-stop", gap_s=0.005, async_scheduling=True).counters
    assert overlapped.useful_tokens > 1.05 * synchronous.useful_tokens


@pytest.mark.parametrize("arm", ["conserve", "fcfs"])
def test_same_seed_same_bytes(tmp_path: Path, arm: str) -> None:
    texts = []
    for name in ("first", "second"):
        steps: list[Step] = []
        outcome = run(3, arm, on_step=steps.append, noise=0.1, link_bytes_per_s=1e7)
        write_records(tmp_path / f"{name}.jsonl.gz", outcome.records)
        write_trace(tmp_path / f"{name}.json", steps, outcome.records)
        texts.append([(tmp_path / f"{name}.{end}").read_bytes() for end in ("jsonl.gz", "json")])
    assert texts[0] == texts[1]


def test_another_seed_gives_other_noise() -> None:
    work = workload(1)
    first = run(1, work=work, noise=0.1).records
    second = run(2, work=work, noise=0.1).records
    assert [r.token_times_s for r in first] != [r.token_times_s for r in second]


def test_a_request_that_can_never_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"needs \d+ KV blocks and the machine has 20"):
        run(1, num_blocks=20)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs_and_adds_up(arm: str) -> None:
    outcome = run(1, arm, link_bytes_per_s=1e8)
    outcome.counters.check()
    assert outcome.counters.num_steps > 0
    assert any(r.online for r in outcome.records) == ARMS[arm].online
    assert any(not r.online for r in outcome.records) == ARMS[arm].offline
    if not ARMS[arm].checkpoints:
        assert outcome.counters.checkpointed_tokens == 0


def test_checkpoints_spare_recomputing() -> None:
    without = run(1, num_blocks=150, max_running=12).counters
    with_link = run(1, num_blocks=150, max_running=12, link_bytes_per_s=1e9).counters
    assert with_link.restored_tokens > 0
    assert with_link.recomputed_tokens < 0.2 * without.recomputed_tokens


def test_an_engine_whose_looks_are_dear_looks_as_seldom_as_it_may() -> None:
    """In short steps, once it has compared long enough."""

    def looks(safepoint_s: float) -> set[int]:
        steps: list[Step] = []
        run(2, safepoint_s=safepoint_s, num_layers=80, on_step=steps.append)
        short = [s.num_looks(80) for s in steps if s.stoppable and s.predicted_s < SHORT_S]
        return set(short[LEAST_SEEN * COMPARE_EVERY :]) - {1}

    assert looks(5e-4) == {LEAST_LOOKS}
    assert max(looks(1e-7)) > LEAST_LOOKS
