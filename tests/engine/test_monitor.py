"""The arrival monitor: who is judged when, and two threads at once."""

from __future__ import annotations

import math
import random
import threading
from dataclasses import dataclass, field

import pytest

from conserve.core.latency import LatencyModel, StepShape
from conserve.core.stopping import RunningStep
from conserve.engine.monitor import ArrivalMonitor
from conserve.engine.promises import Promises
from conserve.engine.settings import EngineSettings
from tests.engine.engine import HandAlarm

TARGET_S = 1.0
MODEL = LatencyModel(fixed=0.0, per_token=0.001, margin=0.02)
"""A prompt of n tokens takes n milliseconds."""


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Flag:
    """Keeps the numbers of the steps that were asked to stop."""

    raised: list[int] = field(default_factory=list)
    layer: int = 0

    def last_passed(self, step: int) -> int:
        return self.layer

    def raise_for(self, step: int) -> None:
        self.raised.append(step)


@dataclass
class Scene:
    patience: float = 0.05
    monitor_class: type[ArrivalMonitor] = ArrivalMonitor

    def __post_init__(self) -> None:
        self.clock, self.flag = Clock(), Flag()
        self.monitor = self.monitor_class(
            self.flag,  # type: ignore[arg-type]
            self.clock,
            Promises(EngineSettings(slo_ttft_s=TARGET_S)),
            self.patience,
            HandAlarm,
        )

    @property
    def alarm(self) -> HandAlarm:
        assert isinstance(self.monitor.alarm, HandAlarm)
        return self.monitor.alarm

    def start(self, predicted_s: float, number: int = 7) -> None:
        step = RunningStep(self.clock.now_s, predicted_s)
        self.monitor.step_started(number, step, MODEL)

    def arrive(self, name: str = "a", num_tokens: int = 10) -> None:
        self.monitor.arrived(name, self.clock.now_s, num_tokens)


def test_an_arrival_during_a_long_step_stops_it() -> None:
    scene = Scene()
    scene.start(0.4)
    scene.clock.now_s += 0.1
    scene.flag.layer = 9
    scene.arrive()
    assert scene.flag.raised == [7]
    scene.clock.now_s += 0.01
    scene.flag.layer = 12
    asked = scene.monitor.step_ended()
    assert asked is not None
    assert asked.at_s == pytest.approx(100.1)
    assert asked.layer == 9
    assert scene.monitor.take_unstopped() == 0


def test_a_step_about_to_end_goes_on() -> None:
    scene = Scene()
    scene.start(0.4)
    scene.clock.now_s += 0.36
    scene.arrive()
    assert scene.flag.raised == []
    assert scene.monitor.step_ended() is None
    assert scene.monitor.take_unstopped() == 1
    assert scene.monitor.take_unstopped() == 0, "taken once"


def test_a_step_that_outruns_its_prediction_is_judged_again() -> None:
    """0.36 s into it 0.04 s remain; 0.05 s past its end another 0.05 s: all patience."""
    scene = Scene()
    scene.start(0.4)
    scene.clock.now_s += 0.36
    scene.arrive()
    assert scene.alarm.at_s == pytest.approx(100.45)
    scene.clock.now_s = 100.44
    scene.alarm.ring()
    assert scene.flag.raised == []
    assert scene.alarm.at_s == pytest.approx(100.45), "it was early"
    scene.monitor.taken("a")  # under async scheduling the scheduler may know of it meanwhile
    scene.clock.now_s = scene.alarm.at_s
    scene.alarm.ring()
    assert scene.flag.raised == [7]
    assert scene.alarm.at_s == math.inf


def test_a_step_begins_when_the_one_before_it_is_over() -> None:
    """Its 0.4 s count from there on: it has not outrun them, and much of them is left."""
    scene = Scene()
    step = RunningStep(scene.clock.now_s + 0.1, 0.4)
    scene.monitor.step_started(7, step, MODEL)
    scene.clock.now_s += 0.48
    scene.arrive()
    assert scene.alarm.at_s == pytest.approx(100.55)
    scene.clock.now_s += 0.01
    scene.monitor.step_begins(scene.clock.now_s)
    assert scene.flag.raised == [7]
    scene.monitor.step_ended()
    scene.monitor.step_begins(scene.clock.now_s)
    assert scene.flag.raised == [7], "nothing runs"


def test_a_step_that_ends_is_not_judged_again() -> None:
    scene = Scene()
    scene.start(0.4)
    scene.clock.now_s += 0.36
    scene.arrive()
    scene.monitor.step_ended()
    assert scene.alarm.at_s == math.inf
    scene.monitor.taken("a")
    scene.start(0.4, number=8)
    assert scene.alarm.at_s == math.inf, "nobody waits for this one"
    scene.clock.now_s += 10
    scene.monitor.judge()
    assert scene.flag.raised == []


def test_who_comes_later_moves_the_moment() -> None:
    """The second has waited for longer: its target is what the step may not make it miss."""
    scene = Scene()
    scene.start(0.4)
    scene.clock.now_s += 0.39
    scene.arrive("a")
    before_s = scene.alarm.at_s
    scene.monitor.arrived("old", scene.clock.now_s - 0.97, 10)
    assert 100.4 < scene.alarm.at_s < before_s


@pytest.mark.parametrize(("patience", "stops"), [(0.0, True), (0.3, True), (0.5, False)])
def test_patience_is_a_share_of_the_target(patience: float, stops: bool) -> None:
    scene = Scene(patience)
    scene.start(0.4)
    scene.arrive()
    assert bool(scene.flag.raised) is stops


@pytest.mark.parametrize(("num_tokens", "stops"), [(50, True), (100, False)])
def test_a_step_with_decodes_stops_if_their_tokens_stay_in_time(
    num_tokens: int, stops: bool
) -> None:
    """0.1 s into it a quarter of its 0.2 s passes at most; 0.05 s are left before the token is due
    for one decode and the prompt."""
    scene = Scene()
    decode = StepShape(num_tokens=1, num_decodes=1)
    step = RunningStep(scene.clock.now_s, 0.2, decode, due_s=scene.clock.now_s + 0.21)
    scene.monitor.step_started(7, step, MODEL)
    scene.clock.now_s += 0.1
    scene.arrive(num_tokens=num_tokens)
    assert bool(scene.flag.raised) is stops


def test_with_full_patience_only_a_missed_target_stops() -> None:
    """The paper's rule: remainder of the step + prefill of all who wait against the target."""
    scene = Scene(patience=1.0)
    scene.start(0.8)
    scene.arrive("a", num_tokens=150)
    assert scene.flag.raised == [], "0.8 s + 0.15 s is in time"
    scene.arrive("b", num_tokens=100)
    assert scene.flag.raised == [7], "0.8 s + 0.25 s is not"


def test_the_oldest_arrival_counts() -> None:
    scene = Scene(patience=1.0)
    scene.start(0.5)
    scene.monitor.arrived("old", scene.clock.now_s - 0.8, 10)
    assert scene.flag.raised == [7]


def test_an_arrival_before_the_step_is_judged_when_it_starts() -> None:
    """It came between the schedule and the report of it."""
    scene = Scene()
    scene.arrive()
    assert scene.flag.raised == []
    scene.start(0.4)
    assert scene.flag.raised == [7]


class StartsBlind(ArrivalMonitor):
    """Careless: forgets arrivals that raced the start of the step."""

    def step_started(self, number: int, step: RunningStep, model: LatencyModel) -> None:
        self.forget_pending()
        super().step_started(number, step, model)


def test_a_careless_start_is_caught() -> None:
    """The negative control of the test above."""
    scene = Scene(monitor_class=StartsBlind)
    scene.arrive()
    scene.start(0.4)
    assert scene.flag.raised == []


def test_an_arrival_that_the_scheduler_took_stops_nothing() -> None:
    scene = Scene()
    scene.arrive()
    assert scene.monitor.num_pending == 1
    scene.monitor.taken("a")
    scene.monitor.taken("never seen")
    assert scene.monitor.num_pending == 0
    scene.start(0.4)
    assert scene.flag.raised == []


def test_an_arrival_after_the_step_stops_nothing() -> None:
    scene = Scene(patience=0.0)
    scene.start(0.4)
    assert scene.monitor.step_ended() is None
    scene.arrive()
    assert scene.flag.raised == []
    assert scene.monitor.take_unstopped() == 0, "nothing ran that could have been stopped"


def test_a_step_is_asked_once() -> None:
    scene = Scene()
    scene.start(0.4)
    for name in "abc":
        scene.arrive(name)
    assert scene.flag.raised == [7]


def test_an_arrival_is_unstopped_only_if_the_step_ran_to_its_end() -> None:
    """The first would have waited; the second cannot, and the stop serves both."""
    scene = Scene(patience=1.0)
    scene.start(0.8)
    scene.arrive("a", num_tokens=100)
    scene.arrive("b", num_tokens=500)
    assert scene.flag.raised == [7]
    assert scene.monitor.step_ended() is not None
    assert scene.monitor.take_unstopped() == 0


def test_every_arrival_of_an_unstopped_step_is_counted() -> None:
    scene = Scene(patience=1.0)
    scene.arrive("early", num_tokens=1)
    scene.start(0.1)
    scene.arrive("a", num_tokens=1)
    scene.arrive("b", num_tokens=1)
    scene.monitor.step_ended()
    assert scene.monitor.take_unstopped() == 3


def test_forgotten_arrivals_hold_nothing_up() -> None:
    scene = Scene()
    scene.arrive()
    scene.monitor.forget_pending()
    scene.start(0.4)
    assert scene.monitor.num_pending == 0
    assert scene.flag.raised == []


def test_a_step_that_ended_is_forgotten() -> None:
    scene = Scene()
    scene.start(0.4, number=1)
    scene.arrive("a")
    scene.monitor.taken("a")
    assert scene.monitor.step_ended() is not None
    scene.start(0.4, number=2)
    assert scene.monitor.step_ended() is None, "the stop of step 1 is not that of step 2"


def test_threads_agree_about_every_step() -> None:
    """Three input threads against the step loop: each stop is of a step that ran when it was
    asked for, is asked for once, and is reported by the end of that very step."""
    scene = Scene()
    done = threading.Event()
    failures: list[BaseException] = []

    def report(thread: int) -> None:
        chance = random.Random(thread)
        try:
            for i in range(2000):
                scene.arrive(f"{thread}-{i}", chance.randrange(1, 50))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=report, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    chance, stopped, number = random.Random(9), [], 0
    while not done.is_set():
        if not any(thread.is_alive() for thread in threads):
            done.set()  # one more step sees all that is left
        number += 1
        scene.start(chance.choice([0.01, 0.4]), number)
        with scene.monitor._lock:
            pending = list(scene.monitor._pending)[:50]
        for name in pending:
            scene.monitor.taken(name)
        if scene.monitor.step_ended() is not None:
            stopped.append(number)
        scene.monitor.take_unstopped()
    for thread in threads:
        thread.join()
    assert not failures
    assert scene.flag.raised == stopped
