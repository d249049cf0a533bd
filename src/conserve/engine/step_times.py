"""When a worker's device began and ended a step: said with its output, which may be read late.

vLLM's single-process executor reads the output of one step while it is busy with the forward of
the next; what the scheduler's clock shows then says nothing about the step that was read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from conserve.engine.door import AsyncModelRunnerOutput
from conserve.engine.stopped import StoppedOutput


class StepTimes(NamedTuple):
    """In seconds of the machine's monotonic clock, which all of its processes share."""

    launched_s: float
    """When the host began to queue the forward. A device that is still busy begins it later."""
    ended_s: float
    """When the device was done."""


class Mark(Protocol):
    """A point in the queue of a device."""

    def wait(self) -> None:
        """Let the host wait until the device has passed it."""

    def passed_s(self) -> float:
        """When the device passed it; the present time where it has not yet."""


class HostMark:
    """Of a device that the host waits for anyway: it is passed when it is made."""

    def __init__(self) -> None:
        self._passed_s = time.monotonic()

    def wait(self) -> None:
        """Nothing is queued."""

    def passed_s(self) -> float:
        return self._passed_s


class StepClock:
    """One worker's."""

    def __init__(self, make_mark: Callable[[], Mark] = HostMark) -> None:
        self._make_mark = make_mark
        self._launched_s = 0.0

    def launches(self) -> None:
        """Call right before a forward is queued."""
        self._launched_s = time.monotonic()

    def timed(self, output: Any) -> TimedOutput:
        """Call when all of a step is queued, with vLLM's output of it or ours of a stopped one."""
        return TimedOutput(output, self._launched_s, self._make_mark())


class TimedOutput(AsyncModelRunnerOutput):  # type: ignore[misc]
    """A step's output, with its times once it is resolved.

    A stopped step resolves when the device has passed the stop. Nothing else would wait for that:
    no token of it is copied to the host, and the runners take a step whose output is there for
    one whose staging buffers they may fill again.
    """

    def __init__(self, output: Any, launched_s: float, end: Mark) -> None:
        self._output, self._launched_s, self._end = output, launched_s, end

    def get_output(self) -> Any:
        output = self._output
        if isinstance(output, AsyncModelRunnerOutput):
            output = output.get_output()
        if isinstance(output, StoppedOutput):
            self._end.wait()
        output.step_times = StepTimes(self._launched_s, self._end.passed_s())
        return output

    def get_kv_connector_output(self) -> Any:
        """What vLLM, from 0.33 on, keeps of a step whose `get_output` fails."""
        output = self._output
        if isinstance(output, AsyncModelRunnerOutput):
            return output.get_kv_connector_output()
        return output.kv_connector_output


def times_of(output: Any, decided_s: float, now_s: float) -> StepTimes:
    """What came with the output of a step that was decided at `decided_s` and is read now.

    A worker of vLLM's own says nothing, and what one on another machine says is of a clock that
    has nothing to do with ours: such a step ended when its output was read.
    """
    times: StepTimes | None = getattr(output, "step_times", None)
    if times is None or not decided_s <= times.launched_s <= times.ended_s <= now_s:
        return StepTimes(now_s, now_s)
    return times
