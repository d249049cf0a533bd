"""Notices online requests that arrive while a step runs, and stops it if the policy says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from conserve.core.latency import LatencyModel
from conserve.core.stopping import Arrivals, RunningStep, should_stop
from conserve.engine.flag import StopFlag


@dataclass(frozen=True, slots=True)
class AskedStop:
    """A running step was asked to stop: when, and the last safepoint it had passed by then."""

    at_s: float
    layer: int


class ArrivalMonitor:
    """Shared by two threads of the engine process: the input thread reports arrivals, the main
    thread reports steps and takes arrivals over. All methods may be called from either."""

    def __init__(
        self, flag: StopFlag, clock: Callable[[], float], ttft_target_s: float, patience: float
    ) -> None:
        self._flag = flag
        self._clock = clock
        self._ttft_target_s = ttft_target_s
        self._patience = patience
        self._lock = threading.Lock()
        self._step: RunningStep | None = None
        self._number = -1
        """Of that step, as the flag knows it."""
        self._model: LatencyModel | None = None
        self._pending: dict[str, tuple[float, int]] = {}
        """request_id -> (arrival time, prompt tokens) of online requests not yet scheduled."""
        self._asked: AskedStop | None = None
        self._num_in_step = 0
        """Arrivals since the running step started, and those it started with."""
        self._num_unstopped = 0

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def arrived(self, request_id: str, arrival_s: float, num_tokens: int) -> None:
        """An online request reached the engine process."""
        with self._lock:
            self._pending[request_id] = (arrival_s, num_tokens)
            self._num_in_step += 1
            self._judge()

    def taken(self, request_id: str) -> None:
        """The scheduler knows the request from here on."""
        with self._lock:
            self._pending.pop(request_id, None)

    def forget_pending(self) -> None:
        """Arrivals that never reached the scheduler (rejected on the way) hold nothing up."""
        with self._lock:
            self._pending.clear()

    def step_started(self, number: int, step: RunningStep, model: LatencyModel) -> None:
        """A stoppable step was handed to the workers; arrivals that raced it are judged now."""
        with self._lock:
            self._number, self._step, self._model, self._asked = number, step, model, None
            self._num_in_step = len(self._pending)
            if self._pending:
                self._judge()

    def step_ended(self) -> AskedStop | None:
        """Returns when and where the step that ended had been asked to stop, if it had."""
        with self._lock:
            asked, self._asked = self._asked, None
            if self._step is not None and asked is None:
                self._num_unstopped += self._num_in_step
            self._step = None
            return asked

    def take_unstopped(self) -> int:
        """Arrivals in stoppable steps that were left to finish, since the last call."""
        with self._lock:
            count, self._num_unstopped = self._num_unstopped, 0
            return count

    def _judge(self) -> None:
        step, model = self._step, self._model
        if step is None or model is None or self._asked is not None:
            return
        now_s = self._clock()
        arrivals = Arrivals(
            oldest_s=min(arrival_s for arrival_s, _ in self._pending.values()),
            num_tokens=sum(tokens for _, tokens in self._pending.values()),
        )
        target_s, patience = self._ttft_target_s, self._patience
        if should_stop(
            step, arrivals, model, now_s=now_s, ttft_target_s=target_s, patience=patience
        ):
            self._asked = AskedStop(now_s, self._flag.last_passed(self._number))
            self._flag.raise_for(self._number)
