"""The folder of one benchmark: what was run, on what, and the raw record of every run.

run.json                          scenario, arms and their commands, machine, versions
records/POINT/ARM.seed-N.jsonl.gz one request a line
records/POINT/ARM.seed-N.json     the server's counters at both ends of the window
failures.json                     runs that failed, and why
logs/                             what the servers wrote; not published
figures.json, report.md, ...      made from the above alone
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import product, starmap
from pathlib import Path
from typing import Any

from conserve.bench.scale import Speed
from conserve.metrics import RequestRecord, read_records
from conserve.workload import WHOLE, Scenario


class ResultError(ValueError):
    """A result folder that cannot be used; says what to do."""


@dataclass(frozen=True, slots=True)
class RunKey:
    """One run: one arm, one seed, one point of the sweep."""

    point: str
    arm: str
    seed: int

    def __str__(self) -> str:
        point = "" if self.point == WHOLE else f" at {self.point}"
        return f"{self.arm}{point}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Description:
    """What makes a result repeatable. Paths in commands are replaced by what they stand for.

    scales: what each trace was multiplied by. scale: the machine's, which the scenario here is
    already fitted to; a result that names none has 1. speed: what was measured for it, if it was.
    """

    command: str
    started: str
    model: str
    machine: dict[str, str]
    versions: dict[str, str]
    environment: dict[str, str]
    scenario: dict[str, Any]
    arms: dict[str, dict[str, str]]
    scales: list[str] = field(default_factory=list)
    scale: float = 1.0
    speed: dict[str, float] | None = None

    def parsed_scenario(self) -> Scenario:
        return Scenario.of(self.scenario, "run.json: scenario")

    def scale_in_words(self) -> str:
        measured = f" (measured: {Speed(**self.speed)})" if self.speed else ""
        return f"{self.scale:g}{measured}"

    def workload(self) -> dict[str, Any]:
        """The scenario by what decides its figures: which arms and seeds were run does not, and
        whether lengths are fixed is in the lengths."""
        table = self.parsed_scenario().model_dump(mode="json")
        dropped = ("arms", "seeds", "about", "fixed_lengths")
        return {name: value for name, value in table.items() if name not in dropped}


@dataclass(frozen=True, slots=True)
class Run:
    """One finished run as it was stored."""

    key: RunKey
    records: list[RequestRecord]
    counters_start: dict[str, float]
    counters_end: dict[str, float]
    probe_gflops: float

    def counted(self, name: str) -> float | None:
        """How far a counter rose over the window; None if the server has no such counter."""
        if name not in self.counters_end:
            return None
        return self.counters_end[name] - self.counters_start.get(name, 0.0)


class ResultFolder:
    """Reads and writes one benchmark's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def records_path(self, key: RunKey) -> Path:
        return self.path / "records" / key.point / f"{key.arm}.seed-{key.seed}.jsonl.gz"

    def counters_path(self, key: RunKey) -> Path:
        return self.path / "records" / key.point / f"{key.arm}.seed-{key.seed}.json"

    def log_path(self, arm: str, seed: int) -> Path:
        return self.path / "logs" / f"{arm}.seed-{seed}.log"

    def has(self, key: RunKey) -> bool:
        return self.records_path(key).is_file()

    def write_description(self, description: Description) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        _write_json(self.path / "run.json", asdict(description))

    def description(self) -> Description:
        """Raises ResultError when this is no result folder."""
        table = _read_json(self.path / "run.json")
        known = {f.name for f in fields(Description)}
        if missing := sorted(known - set(table) - {"scale", "speed"}):
            raise ResultError(f"{self.path / 'run.json'}: no field {missing[0]!r}")
        return Description(**{name: table[name] for name in known & set(table)})

    def failures(self) -> dict[RunKey, str]:
        path = self.path / "failures.json"
        rows = _read_json(path) if path.is_file() else []
        return {RunKey(row["point"], row["arm"], row["seed"]): row["why"] for row in rows}

    def write_failures(self, failures: dict[RunKey, str]) -> None:
        rows = [{**asdict(key), "why": why} for key, why in failures.items()]
        _write_json(self.path / "failures.json", rows)

    def runs(self) -> Iterator[Run]:
        """Every finished run, in the order of points, arms and seeds."""
        scenario = self.description().parsed_scenario()
        for key in starmap(RunKey, product(scenario.places(), scenario.arms, scenario.seeds)):
            if self.has(key):
                yield self.run(key)

    def run(self, key: RunKey) -> Run:
        """One finished run."""
        counters = _read_json(self.counters_path(key))
        records = read_records(self.records_path(key))
        return Run(key, records, counters["start"], counters["end"], counters["probe_gflops"])


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ResultError(
            f"{path}: cannot be read: {error}. Name a folder that `conserve bench run` wrote."
        ) from error
