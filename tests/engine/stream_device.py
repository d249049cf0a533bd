"""A device with streams and events that takes every freedom CUDA has, on a CPU and seeded.

The host queues and runs ahead; nothing happens until somebody lets the device get on, by a random
number of operations on randomly chosen streams, whatever the streams' order allows. What is
queued when a step unwinds stays queued. An event that the host waits for is reached by running
no more than has to be.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class HangError(AssertionError):
    """The streams wait for each other."""


class StandInEvent:
    def __init__(self, device: StandInDevice) -> None:
        self._device, self.passed_at = device, 0
        """Count of operations done when it was passed; 0 until then."""

    def query(self) -> bool:
        return bool(self.passed_at)

    def synchronize(self) -> None:
        while not self.passed_at:
            if not self._device.advance():
                raise HangError("the host waits for what cannot happen")


class StandInStream:
    def __init__(self, device: StandInDevice, name: str) -> None:
        self._device, self.name = device, name
        self.queue: deque[Callable[[], None] | tuple[str, StandInEvent]] = deque()

    def submit(self, work: Callable[[], None]) -> None:
        self.queue.append(work)

    def record(self) -> StandInEvent:
        event = StandInEvent(self._device)
        self.queue.append(("record", event))
        return event

    def wait(self, event: StandInEvent) -> None:
        if self.name not in self._device.forgets:
            self.queue.append(("wait", event))

    def synchronize(self) -> None:
        self.record().synchronize()

    def can_go_on(self) -> bool:
        if not self.queue:
            return False
        head = self.queue[0]
        return not (isinstance(head, tuple) and head[0] == "wait") or head[1].query()

    def go_on(self, now: int) -> None:
        head = self.queue.popleft()
        if not isinstance(head, tuple):
            head()
        elif head[0] == "record":
            head[1].passed_at = now


class StandInDevice:
    """`forgets` names streams whose waits are left out: careless code."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._now = 0
        self.forgets: set[str] = set()
        self.compute = StandInStream(self, "compute")
        self.streams = [self.compute]
        self.host_made: list[torch.Tensor] = []
        """What was asked for of the host's memory."""

    def prepare_thread(self) -> None:
        """A thread is as good as another."""

    def compute_stream(self) -> StandInStream:
        return self.compute

    def side_stream(self) -> StandInStream:
        made = StandInStream(self, ("gathers", "copies")[len(self.streams) - 1])
        self.streams.append(made)
        return made

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.full((num_bytes,), 85, dtype=torch.int8)

    def host_empty(self, num_bytes: int) -> torch.Tensor:
        made = torch.empty(num_bytes, dtype=torch.int8)
        self.host_made.append(made)
        return made

    def seconds(self, begun: StandInEvent, done: StandInEvent) -> float:
        assert begun.query(), "timed before it was passed"
        assert done.query(), "timed before it was passed"
        return float(done.passed_at - begun.passed_at)

    # What only tests call

    def advance(self) -> bool:
        """One operation of one stream; False where none can go on."""
        able = [stream for stream in self.streams if stream.can_go_on()]
        if not able:
            return False
        self._now += 1
        self._chance.choice(able).go_on(self._now)
        return True

    def dawdle(self, most: int) -> None:
        for _ in range(self._chance.randrange(most + 1)):
            self.advance()

    def finish(self) -> None:
        while any(stream.queue for stream in self.streams):
            if not self.advance():
                raise HangError("the streams wait for each other")

    @contextmanager
    def without_waits_on(self, name: str) -> Iterator[None]:
        self.forgets.add(name)
        try:
            yield
        finally:
            self.forgets.discard(name)
