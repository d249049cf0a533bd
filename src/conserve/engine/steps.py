"""Steps in flight, and what a finished one teaches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from conserve.core.latency import LatencyModel, StepShape
from conserve.core.learning import Experience
from conserve.core.plan import Plan
from conserve.core.stopping import RunningStep
from conserve.engine.stats import EngineStats
from conserve.engine.step_times import StepTimes
from conserve.engine.stopped import Before

GENERIC_MODEL = LatencyModel(fixed=0.02, per_token=1e-3, margin=0.2)
"""Believed before anything was measured."""
GENERIC_ERROR = 0.2
"""Its mean error, by guess."""


@dataclass(slots=True)
class StepRecord:
    """One scheduled step, kept until its output comes back."""

    number: int
    plan: Plan
    started_s: float
    """When it was decided."""
    begins_s: float = 0.0
    """When it begins, as far as that is known: under async scheduling once those before it end."""
    predicted_s: float = 0.0
    shape: StepShape = field(default_factory=StepShape)
    offline_shape: StepShape = field(default_factory=StepShape)
    before: dict[str, Before] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    """request_id -> its computed tokens once this step is done."""
    num_looks: int = 0
    """At the flag, of a step that can be stopped."""
    times: StepTimes | None = None
    """When the device began and ended it, once its output is in."""

    @property
    def expected_end_s(self) -> float:
        return self.begins_s + self.predicted_s

    def running(self) -> RunningStep:
        plan = self.plan
        shape, due_s, forced = plan.online_shape, plan.due_s, plan.forced_tokens
        return RunningStep(self.begins_s, self.predicted_s, shape, due_s, forced)


class StepsInFlight:
    """Steps whose output is not in yet, oldest first: two at most under async scheduling."""

    def __init__(self) -> None:
        self._records: deque[StepRecord] = deque()
        self.last_number = 0
        """Steps are numbered from 1 on."""

    def begin(self, plan: Plan, now_s: float) -> StepRecord:
        self.last_number += 1
        record = StepRecord(self.last_number, plan, now_s)
        self._records.append(record)
        return record

    def end(self) -> StepRecord:
        """The oldest: its output is in. Raises IndexError where there is none."""
        return self._records.popleft()

    def next_begins(self, begins_s: float) -> None:
        """The step before those in flight is over: the oldest of them that holds tokens begins."""
        for record in self._records:
            if record.ends:
                record.begins_s = begins_s
                return

    def forget(self) -> None:
        """Their output never comes: the engine failed under them."""
        self._records.clear()

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def learn(experience: Experience, record: StepRecord, ended_s: float, stats: EngineStats) -> None:
    """A step's output is in, and the step was not stopped."""
    num_offline = record.offline_shape.num_tokens
    started_s, looks = record.started_s, record.num_looks
    lesson = experience.ended(record.shape, num_offline, started_s, ended_s, looks)
    if lesson is None:
        return
    stats.count("steps", 1, str(record.plan.mode))
    stats.observe("step_seconds", lesson.seconds)
    stats.observe("step_predicted_seconds", lesson.predicted_s)
    stats.set("latency_model_error_ratio", experience.recalibrator.mean_error)
    stats.set("stop_look_seconds", experience.look_cost.seconds)
