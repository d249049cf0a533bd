"""Where the time until an online request's first token goes: engine and simulator tell of every
step, and get each first token's time back in parts that add up to it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Mode

NUM_RECENT = 16
"""Steps that ended between a request's arrival and the moment its scheduler learns of it."""

ROUNDING_S = 1e-7
"""No part is as short."""


class Part(StrEnum):
    """What a request that waits for its first token waits for, in the order in which it does."""

    IDLE = "idle"
    """For no step: nothing ran that was decided without it. Takes no time."""
    ONLINE_STEP = "online_step"
    """The end of a step that was decided without it and has no offline token: as alone."""
    PREFILL_STEP = "prefill_step"
    """The same with somebody else's first token in it, and offline tokens beside."""
    UNSTOPPABLE_STEP = "unstoppable_step"
    """The same of a step with offline tokens that cannot be stopped."""
    STOPPABLE_STEP = "stoppable_step"
    """The same of one that can be: its end, or somebody's word to stop."""
    STOP = "stop"
    """From that word to the end of the stopped step."""
    QUEUE = "queue"
    """Steps decided since that hold none of its tokens."""
    PREFILL = "prefill"
    """Its own steps, as long as their online tokens alone take."""
    OFFLINE = "offline"
    """By how much offline tokens beside them lengthen those."""
    BETWEEN = "between"
    """No step: what host, API server and copies take."""

    @property
    def in_words(self) -> str:
        return IN_WORDS[self]


IN_WORDS = {
    Part.IDLE: "no step: nothing ran",
    Part.ONLINE_STEP: "a step without offline work",
    Part.PREFILL_STEP: "a step with another first token",
    Part.UNSTOPPABLE_STEP: "a step that cannot be stopped",
    Part.STOPPABLE_STEP: "a step that can be, before a stop",
    Part.STOP: "the stop itself",
    Part.QUEUE: "steps of others",
    Part.PREFILL: "its own steps",
    Part.OFFLINE: "offline work in them",
    Part.BETWEEN: "host and API server",
}
"""What a line of a report says it waited for."""
Parts = Mapping[Part, float]
"""Seconds; what did not happen is absent."""


@dataclass(frozen=True, slots=True)
class EndedStep:
    """A step with tokens in it, when it is over. Times in seconds of one clock."""

    decided_s: float
    ended_s: float
    kind: Part
    holds: Collection[str]
    """Ids of the requests that it computed tokens of; of a stopped step none."""
    online_share: float = 1.0
    """Of its time, what its online part takes alone."""
    asked_s: float = math.inf
    """When it was asked to stop."""


def kind_of(
    mode: Mode, num_online_tokens: int, num_offline_tokens: int, *, stoppable: bool
) -> Part:
    """What somebody waits for who comes while the step runs."""
    if not num_offline_tokens:
        return Part.ONLINE_STEP
    if stoppable:
        return Part.STOPPABLE_STEP
    if mode is Mode.ONLINE_PREFILL and num_online_tokens:
        return Part.PREFILL_STEP
    return Part.UNSTOPPABLE_STEP


def online_share(model: LatencyModel, online_shape: StepShape, shape: StepShape) -> float:
    """What the online part of a step takes alone, over what the whole step does; by the model."""
    if not online_shape.num_tokens:
        return 0.0
    whole_s = model.predict_s(shape)
    return min(1.0, model.predict_s(online_shape) / whole_s) if whole_s > 0 else 1.0


@dataclass(slots=True)
class _Wait:
    arrival_s: float
    known_s: float
    parts: dict[Part, float] = field(default_factory=dict)
    busy_s: float = 0.0
    """Time in steps that ended before the first that was decided with it in mind."""
    own_s: float = 0.0

    def add(self, part: Part, seconds: float) -> None:
        if seconds > ROUNDING_S:
            self.parts[part] = self.parts.get(part, 0.0) + seconds

    def meets(self, step: EndedStep, began_s: float) -> None:
        """A step that was decided without it is over."""
        since_s = max(began_s, self.arrival_s)
        until_s = min(max(since_s, step.asked_s), step.ended_s)
        self.add(step.kind, until_s - since_s)
        self.add(Part.STOP, step.ended_s - max(until_s, since_s))


class FirstTokens:
    """Told of every online request and of every step's end, oldest first. Costs next to nothing
    while nobody waits for a first token."""

    def __init__(self) -> None:
        self._waits: dict[str, _Wait] = {}
        self._unsettled: list[_Wait] = []
        """Those for whom no step is over yet that was decided with them in mind."""
        self._recent: deque[tuple[EndedStep, float]] = deque(maxlen=NUM_RECENT)
        """The last steps, and when each began."""
        self._busy_s = 0.0

    def arrived(self, request_id: str, arrival_s: float, known_s: float) -> None:
        """An online request came, and whoever decides steps has known of it since `known_s`."""
        wait = _Wait(arrival_s, known_s)
        for step, began_s in self._recent:
            wait.meets(step, began_s)
        self._waits[request_id] = wait
        self._unsettled.append(wait)

    def ended(self, step: EndedStep) -> None:
        """Steps may overlap (async scheduling): one begins when the one before it has ended."""
        last_s = self._recent[-1][0].ended_s if self._recent else -math.inf
        began_s = max(step.decided_s, last_s)
        if self._unsettled:
            self._settle(step, began_s)
        seconds = max(0.0, step.ended_s - began_s)
        self._busy_s += seconds
        self._recent.append((step, began_s))
        for name in self._waits.keys() & step.holds if self._waits else ():
            wait = self._waits[name]
            wait.own_s += seconds
            wait.add(Part.PREFILL, seconds * step.online_share)
            wait.add(Part.OFFLINE, seconds * (1 - step.online_share))

    def _settle(self, step: EndedStep, began_s: float) -> None:
        for wait in self._unsettled:
            if step.decided_s < wait.known_s:
                wait.meets(step, began_s)
            else:
                wait.busy_s = self._busy_s
        self._unsettled = [w for w in self._unsettled if step.decided_s < w.known_s]

    def first_token(self, request_id: str, now_s: float) -> Parts:
        """Its first token left at `now_s`, after its step's end: what it waited for, together the
        time since its arrival. Empty for a request that waits for none."""
        wait = self._waits.pop(request_id, None)
        if wait is None:
            return {}
        if not wait.parts.keys() - {Part.PREFILL, Part.OFFLINE}:
            wait.parts[Part.IDLE] = 0.0
        wait.add(Part.QUEUE, self._busy_s - wait.busy_s - wait.own_s)
        wait.add(Part.BETWEEN, now_s - wait.arrival_s - sum(wait.parts.values()))
        return wait.parts

    def drop_finished(self, live: Collection[str]) -> None:
        """Forget requests that have ended without one; call it now and then."""
        if len(self._waits) > 2 * len(live) + 64:
            self._waits = {name: wait for name, wait in self._waits.items() if name in live}
