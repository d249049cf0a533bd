"""Notices online requests that arrive while a step runs, and stops it if the policy says so."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from conserve.core.latency import LatencyModel
from conserve.core.stopping import Arrival, Arrivals, RunningStep, stop_at_s
from conserve.engine.alarm import Alarm
from conserve.engine.flag import StopFlag
from conserve.engine.promises import Promises


@dataclass(frozen=True, slots=True)
class AskedStop:
    """A running step was asked to stop: when, and the last safepoint it had passed by then."""

    at_s: float
    layer: int


class ArrivalMonitor:
    """Shared by three threads of the engine process: the input thread reports arrivals, the main
    thread reports steps and takes arrivals over, and the alarm's has a step judged again that
    outruns its prediction while they wait. All methods may be called from any."""

    def __init__(
        self,
        flag: StopFlag,
        clock: Callable[[], float],
        promises: Promises,
        patience: float,
        make_alarm: Callable[..., Alarm] = Alarm,
    ) -> None:
        self._flag = flag
        self._clock = clock
        self._promises = promises
        self._patience = patience
        self._lock = threading.Lock()
        self.alarm = make_alarm(clock, self.judge)
        """Set to when the running step is to be judged again, if it is."""
        self._step: RunningStep | None = None
        self._number = -1
        """Of that step, as the flag knows it."""
        self._model: LatencyModel | None = None
        self._pending: dict[str, Arrival] = {}
        """Online requests that the scheduler does not know yet, by id."""
        self._waiting: list[Arrival] = []
        """The same of all that the running step was decided without, known by now or not."""
        self._asked: AskedStop | None = None
        self._num_unstopped = 0

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def arrived(
        self,
        request_id: str,
        arrival_s: float,
        num_tokens: int,
        ttft_target_s: float | None = None,
    ) -> None:
        """An online request reached the engine process. `ttft_target_s`: its own, if it has one."""
        ttft_target_s = ttft_target_s or self._promises.targets.ttft_s
        arrival = Arrival(arrival_s, num_tokens, ttft_target_s)
        with self._lock:
            self._pending[request_id] = arrival
            if self._step is not None:
                self._waiting.append(arrival)
            self._judge()

    def judge(self) -> None:
        """Look again whether to stop the step that runs: time has passed."""
        with self._lock:
            self._judge()

    def taken(self, request_id: str) -> None:
        """The scheduler knows the request from here on."""
        with self._lock:
            self._pending.pop(request_id, None)

    def forget_pending(self) -> None:
        """Arrivals that never reached the scheduler (rejected on the way) hold nothing up."""
        with self._lock:
            self._pending.clear()
            self._waiting.clear()

    def step_started(self, number: int, step: RunningStep, model: LatencyModel) -> None:
        """A stoppable step was handed to the workers; arrivals that raced it are judged now."""
        with self._lock:
            self._number, self._step, self._model, self._asked = number, step, model, None
            self._waiting = list(self._pending.values())
            self._judge()

    def step_begins(self, begins_s: float) -> None:
        """Under async scheduling: the step before the one that may be stopped is over, sooner or
        later than expected."""
        with self._lock:
            if self._step is not None:
                self._step = replace(self._step, begins_s=begins_s)
                self._judge()

    def step_ended(self) -> AskedStop | None:
        """Returns when and where the step that ended had been asked to stop, if it had."""
        with self._lock:
            asked, self._asked = self._asked, None
            if self._step is not None and asked is None:
                self._num_unstopped += len(self._waiting)
            self._step = None
            self._waiting.clear()
            self.alarm.set(math.inf)
            return asked

    def take_unstopped(self) -> int:
        """Arrivals in stoppable steps that were left to finish, since the last call."""
        with self._lock:
            count, self._num_unstopped = self._num_unstopped, 0
            return count

    def _judge(self) -> None:
        step, model = self._step, self._model
        if step is None or model is None or self._asked is not None or not self._waiting:
            return
        now_s = self._clock()
        stop_s = stop_at_s(
            step,
            Arrivals.of(self._waiting),
            model,
            now_s=now_s,
            patience=self._patience,
        )
        if stop_s > now_s:
            self.alarm.set(stop_s)
            return
        self._asked = AskedStop(now_s, self._flag.last_passed(self._number))
        self._flag.raise_for(self._number)

    def close(self) -> None:
        self.alarm.close()
