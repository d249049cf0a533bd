"""The last notable events, in words."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from conserve.server.dashboard.messages import Event, EventKind
from conserve.server.series import Change

KEPT = 50
QUIET_S = 3.0
"""Seconds without another stop or displacement after which an episode is over."""
BURST_S = 2.0
"""Arrivals so shortly before an episode belong to it."""


@dataclass(slots=True)
class _Noted:
    """An event whose words may still change."""

    time_s: float
    kind: EventKind
    text: str


@dataclass(slots=True)
class _Episode:
    """Stops and displacements that follow each other closely, and the arrivals they were for."""

    event: _Noted
    last_s: float
    arrived: float = 0.0
    stopped: float = 0.0
    dropped: float = 0.0
    displaced: float = 0.0
    lost: float = 0.0

    def take(self, change: Change) -> None:
        self.last_s = change.time_s
        self.stopped += change.total("stopped_steps_total")
        self.dropped += change.total("dropped_tokens_total")
        self.displaced += change.total("displaced_requests_total")
        self.lost += change.total("displaced_tokens_total")
        self.lost -= change.total("displaced_covered_tokens_total")

    def words(self) -> str:
        done = []
        if self.displaced:
            done.append(f"displaced {count(self.displaced, 'offline request')}")
        if self.stopped:
            done.append(f"stopped {count(self.stopped, 'step')} half-way")
        came = f" for {count(self.arrived, 'arrival')}" if self.arrived == 1 else ""
        if self.arrived > 1:
            came = f" for a burst of {self.arrived:,.0f}"
        what = " and ".join(done)
        cost = f"{count(self.lost + self.dropped, 'token')} to compute again"
        return f"{what[0].upper()}{what[1:]}{came}: {cost}."


class Events:
    """Filled by `add`, once for each change, in order; `newest` lists them."""

    def __init__(self) -> None:
        self._events: deque[_Noted] = deque(maxlen=KEPT)
        self._episode: _Episode | None = None
        self._arrivals: deque[tuple[float, float]] = deque()
        self._late = False
        self._restored = 0.0

    def newest(self) -> list[Event]:
        return [Event(one.time_s, one.kind, one.text) for one in reversed(self._events)]

    def say(self, time_s: float, kind: EventKind, text: str) -> None:
        self._events.append(_Noted(time_s, kind, text))

    def add(self, change: Change) -> None:
        arrived = change.total("requests_total", "online")
        self._arrivals.append((change.time_s, arrived))
        while change.time_s - self._arrivals[0][0] > BURST_S:
            self._arrivals.popleft()
        acted = change.total("stopped_steps_total") or change.total("displaced_requests_total")
        episode = self._episode
        if episode and change.time_s - episode.last_s > QUIET_S:
            self._episode = episode = None
        if acted and episode is None:
            episode = _Episode(_Noted(change.time_s, "yield", ""), change.time_s)
            episode.arrived = sum(number for _, number in self._arrivals)
            self._episode = episode
            self._events.append(episode.event)
        elif episode is not None:
            episode.arrived += arrived
        if episode is not None:
            if acted:
                episode.take(change)
            episode.event.text = episode.words()
        self._note_restored(change)

    def _note_restored(self, change: Change) -> None:
        number = change.total("restored_tokens_total")
        if not number:
            return
        newest = self._events[-1] if self._events else None
        if newest is None or newest.kind != "restore" or change.time_s - newest.time_s > QUIET_S:
            self.say(change.time_s, "restore", "")
            self._restored = 0.0
        self._restored += number
        self._events[
            -1
        ].text = (
            f"Restored {count(self._restored, 'token')} of displaced requests from checkpoints."
        )

    def judge(self, time_s: float, late: bool, text: str) -> None:
        """Note when chat leaves its targets and when it is back."""
        if late != self._late:
            self._late = late
            self.say(time_s, "late" if late else "well", text)


def count(number: float, noun: str) -> str:
    """`1 step`, `2 steps`, `1,200 steps`."""
    return f"{number:,.0f} {noun}" + ("" if number == 1 else "s")
