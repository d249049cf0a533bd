"""What copying needs of a device that works through streams, and nothing more of CUDA.

The host queues work and runs ahead. A stream works its queue off in order; streams work side by
side, and what one does is ordered after another's only where it waits for an event of the other.
`engine/cuda.py` is the real one; the tests have one that takes the freedoms CUDA has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch


class Event(Protocol):
    """A point in a stream's queue."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Let the host wait until it has."""


AnEvent = TypeVar("AnEvent", bound=Event)
"""A device knows its own."""


class Stream(Protocol[AnEvent]):
    def submit(self, work: Callable[[], None]) -> None:
        """Queue what `work` does to tensors. It is called once, now or when its turn comes; what
        it reads of the host's memory must stay as it is until then."""

    def record(self) -> AnEvent: ...

    def wait(self, event: AnEvent) -> None:
        """What is queued from here on begins after the event."""

    def synchronize(self) -> None:
        """Let the host wait for all that is queued."""


class Device(Protocol[AnEvent]):
    def prepare_thread(self) -> None:
        """Call in a thread of one's own before anything else is asked of the device there."""

    def compute_stream(self) -> Stream[AnEvent]:
        """The one that the calling thread's forwards are queued on."""

    def side_stream(self) -> Stream[AnEvent]:
        """A new one, that yields to the forwards as far as the device can tell them apart."""

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Bytes on the device. Raises RuntimeError where there is no room."""

    def host_empty(self, num_bytes: int) -> torch.Tensor:
        """Bytes of the host for one copy to the device: the host does not wait for its turn, and
        may let go of them once it is queued."""

    def seconds(self, begun: AnEvent, done: AnEvent) -> float:
        """Between two events that have passed."""
