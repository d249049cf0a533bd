"""What a step took is learned from when the device was done with it, not from when that was read.

The engine of these tests is vLLM's asynchronous loop over its single-process executor: an empty
output queued behind a step is read when the step after it has been dispatched, and a step that
may be stopped is dispatched when it is nearly over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.latency import LatencyModel, StepShape
from conserve.engine.capabilities import runs_workers_inside
from conserve.engine.door import AsyncModelRunnerOutput, ModelRunnerOutput
from conserve.engine.driver import Driver
from conserve.engine.step_times import HostMark, StepClock, StepTimes, times_of
from conserve.engine.steps import StepRecord, learn
from conserve.engine.stopped import StoppedOutput
from tests.engine.device import Device
from tests.engine.engine import (
    BLOCK_SIZE,
    IDLE_S,
    Engine,
    InFlight,
    make_request,
    make_scheduler,
)

pytestmark = pytest.mark.engine

TRUTH = LatencyModel(fixed=0.03, per_token=1e-3, margin=0.1)


@dataclass
class TrueEngine(Engine):
    """Its steps take what `TRUTH` says."""

    read_after_s: list[float] = field(default_factory=list)
    """How long after the device was done with a step its output was read."""

    def _finish(self, flight: InFlight) -> None:
        if flight.output.total_num_scheduled_tokens:
            late_s = self.scheduler.clock.now_s - flight.times.ended_s
            self.read_after_s.append(max(0.0, late_s))
        super()._finish(flight)

    def seconds(self, record: Any) -> float:
        return TRUTH.predict_s(record.shape)


MakeEngine = Callable[..., TrueEngine]


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make(depth: int = 2, **options: Any) -> TrueEngine:
        scheduler = make_scheduler(tmp_path, async_scheduling=depth > 1, **options)
        made.append(scheduler)
        return TrueEngine(scheduler, Device(BLOCK_SIZE), depth=depth, stop=lambda step: False)

    yield make
    for scheduler in made:
        scheduler.shutdown()


def run_offline_work(engine: TrueEngine, online_every: int = 0) -> list[float]:
    """Learned over true step times, of steps that may be stopped and, beside online requests,
    of some that may not."""
    ratios: list[float] = []
    observe = engine.scheduler.experience.recalibrator.observe

    def observed(shape: StepShape, seconds: float) -> None:
        ratios.append(seconds / TRUTH.predict_s(shape))
        observe(shape, seconds)

    engine.scheduler.experience.recalibrator.observe = observed
    for i in range(12):
        online = bool(online_every) and i % online_every == 0
        prompt = [(31 * i + j) % 900 + 1 for j in range(20)]
        now_s = engine.scheduler.clock.now_s
        engine.add(make_request(f"r{i}", prompt, 8, online=online, arrival_s=now_s))
    engine.run()
    assert len(ratios) > 10
    return ratios


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("online_every", [0, 3], ids=["offline", "mixed"])
def test_learned_step_times_are_the_devices(
    make_engine: MakeEngine, depth: int, online_every: int
) -> None:
    ratios = run_offline_work(make_engine(depth), online_every)
    assert ratios == pytest.approx([1.0] * len(ratios))


def test_what_the_host_takes_before_a_lonely_step_counts_as_its_time(
    make_engine: MakeEngine,
) -> None:
    """Whoever waits for a token of the step waits for that as well."""
    engine = make_engine(depth=1)
    engine.prepare_s = 0.003
    assert min(run_offline_work(engine)) > 1.0


def test_the_gap_behind_stoppable_steps_is_learned(make_engine: MakeEngine) -> None:
    """From the step's end to the next one's first layer: the loop's nap, and what the host takes
    to prepare it."""
    engine = make_engine()
    engine.prepare_s = 0.004
    run_offline_work(engine)
    learned_s = engine.scheduler.experience.stop_gap.seconds
    assert learned_s == pytest.approx(0.004 + IDLE_S)


def test_an_engine_that_decides_nothing_ahead_loses_nothing_to_stops(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(depth=1)
    engine.prepare_s = 0.004
    run_offline_work(engine)
    assert engine.scheduler.experience.stop_gap.seconds == 0.0


def run_inside(engine: TrueEngine, *, careful: bool) -> float:
    """The worker is in the engine's process; the longest that a step's tokens were left lying."""
    assert not engine.scheduler.driver.dispatch_blocks, "vLLM has a process for it on a CPU"
    engine.scheduler.driver.dispatch_blocks = careful
    run_offline_work(engine, online_every=3)
    return max(engine.read_after_s)


def test_no_stoppable_step_begins_before_the_last_ones_tokens_are_read(
    make_engine: MakeEngine,
) -> None:
    """The host is away in it until it is nearly over."""
    assert run_inside(make_engine(), careful=True) < 2 * IDLE_S
    assert run_inside(make_engine(), careful=False) > TRUTH.fixed / 2, "the negative control"


@pytest.mark.parametrize(("backend", "inside"), [("uni", True), ("mp", False)])
def test_where_the_engine_runs_the_forward_itself(backend: str, inside: bool) -> None:
    parallel = SimpleNamespace(distributed_executor_backend=backend)
    assert runs_workers_inside(SimpleNamespace(parallel_config=parallel)) is inside


# Negative control of the step times


def learn_when_read(self: Driver, record: StepRecord) -> None:
    """Careless: a step ended when its output was read, and so did an empty one."""
    if record.shape.num_tokens:
        learn(self.experience, record, self.clock(), self.stats)
    else:
        self.experience.stopped(self.clock())


def test_read_late_a_step_would_seem_to_take_a_part_of_its_time(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Driver, "_learn", learn_when_read)
    engine = make_engine()
    engine.tail_s = 0.01
    ratios = run_offline_work(engine)
    assert sum(ratios) / len(ratios) < 0.5, "two to ten times too fast"


# The worker's side


class Queue:
    """A device that works off what it is told to, when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.waited_for: list[QueuedMark] = []

    def mark(self) -> QueuedMark:
        return QueuedMark(self)


class QueuedMark:
    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._passed_s: float | None = None

    def passes(self) -> None:
        self._passed_s = self._queue.now_s

    def wait(self) -> None:
        if self._passed_s is None:
            self._queue.waited_for.append(self)
            self._queue.now_s += 0.5
            self.passes()

    def passed_s(self) -> float:
        return self._queue.now_s if self._passed_s is None else self._passed_s


def output_of(name: str) -> Any:
    return ModelRunnerOutput([name], {name: 0}, [[7]])


def test_a_stopped_step_resolves_when_the_device_has_passed_the_stop() -> None:
    queue = Queue()
    output = StepClock(queue.mark).timed(StoppedOutput.of(["a"], 3, None))
    assert isinstance(output, AsyncModelRunnerOutput), "vLLM resolves it where it reads outputs"
    assert not queue.waited_for, "the host goes on until then"
    resolved = output.get_output()
    assert len(queue.waited_for) == 1
    assert isinstance(resolved, StoppedOutput)
    assert resolved.layers_done == 3
    assert times_of(resolved, decided_s=0.0, now_s=200.0).ended_s == 100.5


def test_tokens_wait_for_nothing_but_themselves() -> None:
    """What a step queues behind its sampling (drafts) does not hold its tokens up."""
    queue = Queue()
    resolved = StepClock(queue.mark).timed(output_of("a")).get_output()
    assert resolved.sampled_token_ids == [[7]]
    assert not queue.waited_for


def test_an_output_that_is_read_late_says_when_its_step_ended() -> None:
    queue, made = Queue(), []

    def mark() -> QueuedMark:
        made.append(queue.mark())
        return made[-1]

    output = StepClock(mark).timed(output_of("a"))
    queue.now_s = 101.0
    made[0].passes()
    queue.now_s = 107.0
    assert times_of(output.get_output(), decided_s=0.0, now_s=107.0).ended_s == 101.0


def test_times_of_a_worker_without_a_queue_are_the_hosts() -> None:
    clock, decided_s = StepClock(HostMark), time.monotonic()
    clock.launches()
    output = clock.timed(output_of("a")).get_output()
    times = times_of(output, decided_s, time.monotonic())
    assert times == output.step_times
    assert decided_s <= times.launched_s <= times.ended_s


def test_an_output_that_says_nothing_ended_when_it_was_read() -> None:
    assert times_of(output_of("a"), decided_s=4.0, now_s=5.0) == StepTimes(5.0, 5.0)


@pytest.mark.parametrize("said", [StepTimes(3.9, 4.5), StepTimes(4.1, 5.1), StepTimes(4.6, 4.5)])
def test_a_clock_of_another_machine_says_nothing(said: StepTimes) -> None:
    """No step is launched before it is decided, nor ends after it is read."""
    output = output_of("a")
    output.step_times = said
    assert times_of(output, decided_s=4.0, now_s=5.0) == StepTimes(5.0, 5.0)
