"""A scenario: what one benchmark sends, for how long, to which arms. Read from a TOML file."""

from __future__ import annotations

import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from conserve.metrics import Targets

from .arrivals import Arrivals, Diurnal, Replay
from .lengths import Empirical, Lengths
from .table import ScenarioError, Table, explain


class TargetTable(Table):
    """The latency targets online users were promised."""

    ttft_ms: float = Field(default=1000.0, gt=0)
    tbt_ms: float = Field(default=200.0, gt=0)

    def targets(self) -> Targets:
        return Targets(ttft_s=self.ttft_ms / 1000, tbt_s=self.tbt_ms / 1000)


class Online(Table):
    """Interactive requests: they arrive when they like (an open loop)."""

    arrivals: Arrivals
    lengths: Lengths | None = None

    @model_validator(mode="after")
    def _one_source_of_lengths(self) -> Online:
        replayed = isinstance(self.arrivals, Replay)
        if replayed and self.lengths is not None:
            raise ValueError("lengths: a replayed trace brings its own; leave them out")
        if not replayed and self.lengths is None:
            raise ValueError("lengths: missing")
        return self


class SharedPrefix(Table):
    """Each request begins with one of `num_prefixes` texts of `tokens` tokens."""

    num_prefixes: int = Field(ge=1)
    tokens: int = Field(ge=1)


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
    arms: tuple[str, ...] = ("online-only", "fcfs", "priority", "conserve")
    targets: TargetTable = TargetTable()
    online: Online | None = None
    offline: Offline | None = None
    server: Server = Server()
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

    def at(self, point: Point | None) -> Scenario:
        """This scenario at one point of its sweep, without the sweep; itself for None."""
        return self if point is None else parse(_put_over(self, point), f"points.{point.name}")

    def trace_names(self) -> list[str]:
        """Names of the traces that must be given by path, in order of first use."""
        specs = [self.online.arrivals, self.online.lengths] if self.online else []
        specs += [self.offline.lengths] if self.offline else []
        used = [s.trace for s in specs if isinstance(s, Replay | Diurnal | Empirical)]
        return list(dict.fromkeys(used))


def load_scenario(path: Path) -> Scenario:
    """Read a scenario file; its name is the file's stem unless it says otherwise.

    Raises ScenarioError for a file that cannot be read or a field that cannot be used.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: {error}") from error
    scenario = parse({"name": path.stem, **table}, str(path))
    for point in scenario.points:
        scenario.at(point)
    return scenario


def parse(table: dict[str, Any], where: str) -> Scenario:
    """A scenario from plain values; `where` begins each error. Raises ScenarioError."""
    try:
        return Scenario.model_validate(table)
    except ValidationError as error:
        raise ScenarioError(explain(error, where)) from error


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
