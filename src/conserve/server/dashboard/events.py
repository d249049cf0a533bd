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
LONGEST_S = 60.0
"""What goes on for longer is told as another: the first may have left the list by then."""


@dataclass(slots=True)
class _Noted:
    """An event whose words may still change."""

    time_s: float
    kind: EventKind
    text: str


@dataclass(slots=True)
class _Going:
    """What may go on with the next change."""

    event: _Noted
    last_s: float

    def is_over(self, time_s: float) -> bool:
        return time_s - self.last_s > QUIET_S or time_s - self.event.time_s >= LONGEST_S


@dataclass(slots=True)
class _Restores(_Going):
    """Tokens that come back from checkpoints in moments that follow each other closely."""

    tokens: float = 0.0

    def take(self, change: Change) -> None:
        self.last_s = change.time_s
        self.tokens += change.total("restored_tokens_total")

    def words(self) -> str:
        return f"Restored {count(self.tokens, 'token')} of displaced requests from checkpoints."


@dataclass(slots=True)
class _Episode(_Going):
    """Stops and displacements that follow each other closely, and the arrivals they were for."""

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
        self._restores: _Restores | None = None
        self._arrivals: deque[tuple[float, float]] = deque()
        """Those that belong to no episode."""
        self._late = False

    def newest(self) -> list[Event]:
        return [Event(one.time_s, one.kind, one.text) for one in reversed(self._events)]

    def say(self, time_s: float, kind: EventKind, text: str) -> _Noted:
        self._events.append(_Noted(time_s, kind, text))
        return self._events[-1]

    def add(self, change: Change) -> None:
        self._arrivals.append((change.time_s, change.total("requests_total", "online")))
        while change.time_s - self._arrivals[0][0] > BURST_S:
            self._arrivals.popleft()
        self._note_yields(change)
        self._note_restores(change)

    def _note_yields(self, change: Change) -> None:
        acted = change.total("stopped_steps_total") or change.total("displaced_requests_total")
        if self._episode and self._episode.is_over(change.time_s):
            self._episode = None
        if acted and self._episode is None:
            self._episode = _Episode(self.say(change.time_s, "yield", ""), change.time_s)
        if (episode := self._episode) is None:
            return
        episode.arrived += sum(number for _, number in self._arrivals)
        self._arrivals.clear()
        if acted:
            episode.take(change)
        episode.event.text = episode.words()

    def _note_restores(self, change: Change) -> None:
        if not change.total("restored_tokens_total"):
            return
        if self._restores is None or self._restores.is_over(change.time_s):
            self._restores = _Restores(self.say(change.time_s, "restore", ""), change.time_s)
        self._restores.take(change)
        self._restores.event.text = self._restores.words()

    def judge(self, time_s: float, late: bool, text: str) -> None:
        """Note when chat leaves its targets and when it is back."""
        if late != self._late:
            self._late = late
            self.say(time_s, "late" if late else "well", text)


def count(number: float, noun: str) -> str:
    """`1 step`, `2 steps`, `1,200 steps`."""
    return f"{number:,.0f} {noun}" + ("" if number == 1 else "s")
