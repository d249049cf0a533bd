"""Steps in flight, and what a finished one teaches: step times, traffic, figures."""

from __future__ import annotations

from dataclasses import dataclass, field

from conserve.core.calibration import Recalibrator
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Mode, Plan
from conserve.core.traffic import TrafficEstimate
from conserve.engine.monitor import RunningStep
from conserve.engine.stats import EngineStats
from conserve.engine.stopped import Before

GENERIC_MODEL = LatencyModel(fixed=0.02, per_token=1e-3, margin=0.2)
"""Believed before anything was measured."""
LONGEST_IDLE_S = 1.0
"""An engine without work has nothing to tell: a longer pause counts as this one."""


@dataclass(slots=True)
class StepRecord:
    """One scheduled step, kept until its output comes back."""

    number: int
    plan: Plan
    started_s: float
    """When it was decided."""
    expected_end_s: float = 0.0
    shape: StepShape = field(default_factory=StepShape)
    offline_shape: StepShape = field(default_factory=StepShape)
    before: dict[str, Before] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    """request_id -> its computed tokens once this step is done."""

    def running(self, begins_s: float, predicted_s: float) -> RunningStep:
        plan = self.plan
        return RunningStep(self.number, begins_s, predicted_s, plan.online_shape, plan.due_s)


class Experience:
    """What the engine has learned while serving. Every time is passed in, in seconds."""

    def __init__(self, now_s: float) -> None:
        self.recalibrator = Recalibrator(GENERIC_MODEL, mean_error=0.2)
        self.traffic = TrafficEstimate()
        self._last_end_s = self._last_schedule_s = now_s
        self._last_mode = Mode.IDLE

    @property
    def model(self) -> LatencyModel:
        return self.recalibrator.model

    def forget_traffic(self) -> None:
        self.traffic = TrafficEstimate()
        self._last_mode = Mode.IDLE

    def schedules(self, now_s: float, *, online_resident: bool) -> None:
        """Call before a step is decided. A wall clock may have been set back."""
        elapsed_s = min(max(now_s - self._last_schedule_s, 0.0), LONGEST_IDLE_S)
        self.traffic.spent(elapsed_s, online_resident=online_resident)
        self._last_schedule_s = now_s

    def decided(self, plan: Plan) -> None:
        """Call with every plan that is not idle: an online one after an offline one is an
        interruption."""
        if self._last_mode is Mode.OFFLINE and plan.num_online_tokens:
            self.traffic.interrupted()
        self._last_mode = plan.mode

    def ended(self, record: StepRecord, now_s: float, stats: EngineStats, *, whole: bool) -> None:
        """A step's output is in. Steps overlap under async scheduling: its own time starts when
        the one before it ended. Only `whole` steps teach the latency model."""
        seconds = now_s - max(record.started_s, self._last_end_s)
        self._last_end_s = now_s
        if not whole or not record.shape.num_tokens or seconds <= 0:
            return
        predicted_s = self.model.predict_s(record.shape)
        self.recalibrator.observe(record.shape, seconds)
        share = record.offline_shape.num_tokens / record.shape.num_tokens
        self.traffic.stepped(seconds, seconds * share)
        stats.count("steps", 1, str(record.plan.mode))
        stats.observe("step_seconds", seconds)
        stats.observe("step_predicted_seconds", predicted_s)
        stats.set("latency_model_error_ratio", self.recalibrator.mean_error)
