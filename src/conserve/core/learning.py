"""What an engine learns while it serves: how long steps take, and how busy the online side is."""

from __future__ import annotations

import math
from typing import NamedTuple

from conserve.core.calibration import Recalibrator
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.looks import LookCost
from conserve.core.plan import Mode, Plan
from conserve.core.stop_gap import StopGap
from conserve.core.traffic import TrafficEstimate

LONGEST_IDLE_S = 1.0
"""An engine without work has nothing to tell: a longer pause counts as this one."""


class Lesson(NamedTuple):
    """A step that ran to its end: what it took, and what had been predicted. In seconds."""

    seconds: float
    predicted_s: float


class Experience:
    """Told of every decision and of every step's end. Every time is passed in, in seconds."""

    def __init__(self, model: LatencyModel, mean_error: float) -> None:
        self.recalibrator = Recalibrator(model, mean_error)
        self.traffic = TrafficEstimate()
        self.stop_gap = StopGap()
        self.look_cost = LookCost()
        self._last_end_s = -math.inf
        self._last_schedule_s: float | None = None
        self._last_mode = Mode.IDLE

    @property
    def model(self) -> LatencyModel:
        return self.recalibrator.model

    def forget_traffic(self) -> None:
        self.traffic = TrafficEstimate()
        self._last_mode = Mode.IDLE

    def schedules(self, now_s: float, *, online_resident: bool) -> None:
        """Call before a step is decided."""
        if self._last_schedule_s is not None:
            elapsed_s = min(now_s - self._last_schedule_s, LONGEST_IDLE_S)
            self.traffic.spent(elapsed_s, online_resident=online_resident)
        self._last_schedule_s = now_s

    def decided(self, plan: Plan) -> None:
        """Call with every plan: an online one after an offline one is an interruption."""
        if plan.mode is Mode.IDLE:
            return
        if self._last_mode is Mode.OFFLINE and plan.num_online_tokens:
            self.traffic.interrupted()
        self._last_mode = plan.mode

    def took_s(self, started_s: float, ended_s: float) -> float:
        """Seconds of its own that a step had, which was decided at `started_s`: steps overlap under
        async scheduling, and its time starts when the one before it ended. To be asked before
        `stopped` or `ended` is called with it."""
        return ended_s - max(started_s, self._last_end_s)

    def stopped(self, ended_s: float) -> None:
        """A step ended before its time, and teaches nothing."""
        self._last_end_s = ended_s

    def ended(
        self,
        shape: StepShape,
        num_offline_tokens: int,
        started_s: float,
        ended_s: float,
        num_looks: int = 0,
    ) -> Lesson | None:
        """A whole step is done, decided at `started_s`, that looked so often whether it is to stop.
        None if there is nothing to learn from it: an empty one takes no time of the device, and is
        read whenever the scheduler comes to it.
        """
        if not shape.num_tokens:
            return None
        seconds = self.took_s(started_s, ended_s)
        self._last_end_s = ended_s
        if seconds <= 0:
            return None
        model = self.model
        lesson = Lesson(seconds, model.predict_s(shape))
        self.recalibrator.observe(shape, seconds)
        if num_looks:
            self.look_cost.ended(seconds, lesson.predicted_s, num_looks)
        fixed_share = model.fixed_s(shape) / lesson.predicted_s if lesson.predicted_s else 0.0
        offline_s = seconds * (num_offline_tokens / shape.num_tokens)
        self.traffic.stepped(seconds, offline_s, fixed_share)
        return lesson
