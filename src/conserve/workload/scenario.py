"""A scenario: what one benchmark sends, for how long, to which arms. Read from a TOML file."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from conserve.core.snapshot import Targets

from .arrivals import Arrivals, Diurnal, Replay
from .fit import Fit
from .lengths import Empirical, Lengths
from .plan import Window
from .sessions import Sessions
from .table import ScenarioError, Table, read_toml

WHOLE = "all"
"""The point's name in a scenario without a sweep."""


class TargetTable(Table):
    """The latency targets online users were promised."""

    ttft_ms: float = Field(default=1000.0, gt=0)
    tbt_ms: float = Field(default=200.0, gt=0)

    def targets(self) -> Targets:
        return Targets(ttft_s=self.ttft_ms / 1000, tbt_s=self.tbt_ms / 1000)

    def fitted(self, fit: Fit) -> TargetTable:
        return TargetTable(ttft_ms=fit.ttft * self.ttft_ms, tbt_ms=fit.tbt * self.tbt_ms)


class Online(Table):
    """Interactive requests, which arrive when they like (an open loop), or the conversations that
    begin so: a turn comes a pause after the answer before it.

    in_lead_in: they come during the lead-in as well, and the window finds what those have left in
    the KV cache.
    """

    arrivals: Arrivals
    lengths: Lengths | None = None
    sessions: tuple[Sessions, ...] = ()
    in_lead_in: bool = False

    @model_validator(mode="after")
    def _one_source_of_lengths(self) -> Online:
        if self.lengths is not None and self.sessions:
            raise ValueError("lengths: sessions bring their own; leave one of the two out")
        given = self.lengths is not None or bool(self.sessions)
        replayed = isinstance(self.arrivals, Replay)
        if replayed and given:
            name = "sessions" if self.sessions else "lengths"
            raise ValueError(f"{name}: a replayed trace brings its own; leave them out")
        if not replayed and not given:
            raise ValueError("lengths: missing (or give sessions)")
        return self

    def fitted(self, fit: Fit) -> Online:
        return self.model_copy(
            update={
                "arrivals": self.arrivals.fitted(fit),
                "lengths": self.lengths.fitted(fit) if self.lengths else None,
                "sessions": tuple(sort.fitted(fit) for sort in self.sessions),
            }
        )


class SharedPrefix(Table):
    """Each request begins with one of `num_prefixes` texts of `tokens` tokens."""

    num_prefixes: int = Field(ge=1)
    tokens: int = Field(ge=1)

    def fitted(self, fit: Fit) -> SharedPrefix:
        return self.model_copy(update={"tokens": fit.length(self.tokens)})


class Offline(Table):
    """Batch requests: `in_flight` of them are with the server at any time, or all at once.

    They begin `lead_in_s` before the clock; `num_requests` are drawn, so that must be more than
    any arm can finish.
    """

    in_flight: int | Literal["all"] = Field(default=24)
    num_requests: int = Field(default=2000, ge=1)
    lengths: Lengths
    shared_prefix: SharedPrefix | None = None

    @model_validator(mode="after")
    def _at_least_one(self) -> Offline:
        if isinstance(self.in_flight, int) and self.in_flight < 1:
            raise ValueError('in_flight: must be at least 1, or "all"')
        return self

    def fitted(self, fit: Fit) -> Offline:
        shared = self.shared_prefix.fitted(fit) if self.shared_prefix else None
        return self.model_copy(
            update={
                "num_requests": fit.count(self.num_requests),
                "lengths": self.lengths.fitted(fit),
                "shared_prefix": shared,
            }
        )


class Point(Table):
    """One point of a sweep: values put over the scenario's own, by dotted name.

    x: where it stands on the axis of the sweep's plot. group: points of one line there.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    x: float
    group: str = ""
    set: dict[str, float | int | str]


class Server(Table):
    """What every arm's server gets in addition."""

    args: tuple[str, ...] = ()


class Scenario(Table):
    """See docs/benchmarks.md for each field. Times in seconds."""

    name: str
    about: str
    duration_s: float = Field(default=60.0, gt=0)
    lead_in_s: float = Field(default=8.0, ge=0)
    drain_s: float = Field(default=30.0, ge=0)
    seeds: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    arms: tuple[str, ...] = Field(("online-only", "fcfs", "priority", "conserve"), min_length=1)
    targets: TargetTable = TargetTable()
    online: Online | None = None
    offline: Offline | None = None
    server: Server = Server()
    fixed_lengths: bool = False
    x_label: str = "online requests a second"
    points: tuple[Point, ...] = ()

    @model_validator(mode="after")
    def _sends_something(self) -> Scenario:
        if self.online is None and self.offline is None:
            raise ValueError("has neither [online] nor [offline]: nothing to send")
        names = [point.name for point in self.points]
        if len(names) != len(set(names)):
            raise ValueError("points: two have the same name")
        return self

    @model_validator(mode="after")
    def _counts_nothing_twice(self) -> Scenario:
        """Three seeds of which two are one have no spread of three."""
        for name in ("seeds", "arms"):
            given = getattr(self, name)
            if twice := [each for each in given if given.count(each) > 1]:
                raise ValueError(f"{name}: {twice[0]!r} is named twice")
        return self

    @property
    def window(self) -> Window:
        return Window(self.lead_in_s, self.duration_s, self.drain_s)

    def at(self, point: Point) -> Scenario:
        """This scenario at one point of its sweep, without the sweep."""
        return Scenario.of(_put_over(self, point), f"points.{point.name}")

    def places(self) -> dict[str, Scenario]:
        """This scenario at each point of its sweep, by the point's name; itself where it has
        none."""
        return {point.name: self.at(point) for point in self.points} or {WHOLE: self}

    def at_scale(self, scale: float) -> Scenario:
        """This scenario, its sweep too, for a machine `scale` times as fast as the one it was
        made on; itself for 1."""
        if scale == 1:
            return self
        fit = Fit.to_scale(scale, fixed_lengths=self.fixed_lengths)
        points = tuple(self._fitted_point(point, fit) for point in self.points)
        return self._fitted(fit).model_copy(update={"points": points})

    def _fitted(self, fit: Fit) -> Scenario:
        return self.model_copy(
            update={
                "duration_s": fit.window * self.duration_s,
                "lead_in_s": fit.window * self.lead_in_s,
                "drain_s": fit.window * self.drain_s,
                "targets": self.targets.fitted(fit),
                "online": self.online.fitted(fit) if self.online else None,
                "offline": self.offline.fitted(fit) if self.offline else None,
            }
        )

    def _fitted_point(self, point: Point, fit: Fit) -> Point:
        """What it sets, as that comes out of fitting the scenario at this point. Its place on
        the axis goes with the rate, where it shows the rate."""
        at = self.at(point)
        table = at._fitted(fit).model_dump()
        values = {dotted: _value_at(table, dotted) for dotted in point.set}
        is_rate = at.online is not None and getattr(at.online.arrivals, "rate_rps", 0) == point.x
        x = point.x / fit.time if is_rate else point.x
        return point.model_copy(update={"set": values, "x": x})

    def trace_names(self) -> list[str]:
        """Names of the traces that must be given by path, those of all points, in order of first
        use."""
        specs: list[object] = []
        for at in (self, *map(self.at, self.points)):
            specs += [at.online.arrivals, at.online.lengths] if at.online else []
            specs += [at.offline.lengths] if at.offline else []
        return traces_of(specs)


def traces_of(specs: Iterable[object]) -> list[str]:
    """Names of the traces that arrivals and lengths are of, in order of first use."""
    used = (spec.trace for spec in specs if isinstance(spec, Replay | Diurnal | Empirical))
    return list(dict.fromkeys(used))


def load_scenario(path: Path) -> Scenario:
    """Read a scenario file; its name is the file's stem unless it says otherwise.

    Raises ScenarioError for a file that cannot be read or a field that cannot be used.
    """
    scenario = Scenario.of({"name": path.stem, **read_toml(path)}, str(path))
    for point in scenario.points:
        scenario.at(point)
    return scenario


def _value_at(table: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        table = table[name]
    return table


def _put_over(scenario: Scenario, point: Point) -> dict[str, Any]:
    table = deepcopy(scenario.model_dump(exclude={"points"}))
    for dotted, value in point.set.items():
        *parents, last = dotted.split(".")
        inner: Any = table
        for parent in parents:
            inner = inner.get(parent) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            raise ScenarioError(f"points.{point.name}: set: no table {'.'.join(parents)!r}")
        inner[last] = value
    return table
