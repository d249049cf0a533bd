"""Layer boundaries of a running forward where it may stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from conserve.engine.flag import StopFlag

RUN_AHEAD = 1
"""Safepoints a CUDA device may be behind the host in a stoppable step: layers enough to be busy
with while the host queues the next ones, and all that is left to run after a stop."""


class StopStep(Exception):  # noqa: N818
    """Unwinds the forward of a stopped step. Carries the safepoints passed before it."""

    def __init__(self, layers_done: int) -> None:
        super().__init__(layers_done)
        self.layers_done = layers_done


class DeviceEvent(Protocol):
    """The part of torch.cuda.Event that bounds the host's run-ahead."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Safepoints:
    """One worker's safepoints. `begin` and `end` bracket a stoppable forward; outside of one
    `at_layer` costs a single branch."""

    def __init__(
        self, flag: StopFlag, rank: int, make_event: Callable[[], DeviceEvent] | None = None
    ) -> None:
        self._decide = flag.lead if rank == 0 else flag.follow
        self._make_event = make_event
        self._events: deque[DeviceEvent] = deque()
        self._step: int | None = None
        self._every = 1
        self._layer = 0

    def begin(self, step: int, every: int) -> None:
        """Watch step number `step`, at every `every`-th layer."""
        self._step, self._every, self._layer = step, max(1, every), 0

    def end(self) -> None:
        self._step = None
        self._events.clear()

    def at_layer(self) -> None:
        """Called before each attention layer. Raises StopStep where the step is to stop."""
        if self._step is None:
            return
        layer = self._layer
        self._layer = layer + 1
        if layer % self._every:
            return
        if self._make_event is not None:
            self._bound_run_ahead(self._make_event)
        if self._decide(self._step, layer):
            self.end()
            raise StopStep(layer)

    def _bound_run_ahead(self, make_event: Callable[[], Any]) -> None:
        """Keep the device's queue short: a stop takes as long as what is queued already."""
        event = make_event()
        event.record()
        self._events.append(event)
        if len(self._events) > RUN_AHEAD:
            self._events.popleft().synchronize()
