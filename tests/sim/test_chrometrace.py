"""The exported trace is what the Trace Event Format asks for, and loses nothing in Perfetto.

Perfetto itself cannot be had offline. What its importer refuses or drops is checked here: an
event without a needed field, a field of another type, and slices of one row that overlap
without one holding the other.
"""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from conserve.metrics import RequestRecord
from conserve.sim.chrometrace import write_trace
from conserve.sim.step import Step
from tests.sim.sim_world import TARGETS, run

Event = dict[str, Any]
FIELDS = {
    "X": {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"},
    "C": {"ph", "name", "pid", "ts", "args"},
    "M": {"ph", "name", "pid", "args"},
}


@pytest.fixture(scope="module")
def played() -> tuple[list[Step], list[RequestRecord]]:
    """A run with stops, displacement, restores and noise."""
    steps: list[Step] = []
    targets = type(TARGETS)(ttft_s=0.05, tbt_s=TARGETS.tbt_s)
    outcome = run(
        2, targets=targets, on_step=steps.append, num_blocks=200, noise=0.1, link_bytes_per_s=1e7
    )
    return steps, outcome.records


@pytest.fixture(scope="module")
def events(
    played: tuple[list[Step], list[RequestRecord]], tmp_path_factory: pytest.TempPathFactory
) -> list[Event]:
    path: Path = tmp_path_factory.mktemp("trace") / "trace.json"
    write_trace(path, *played)
    stored = json.loads(path.read_text(), parse_constant=_refuse)
    assert set(stored) == {"displayTimeUnit", "traceEvents"}
    assert stored["displayTimeUnit"] == "ms"
    found: list[Event] = stored["traceEvents"]
    return found


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def test_every_event_is_of_a_known_kind_with_the_fields_of_that_kind(events: list[Event]) -> None:
    for event in events:
        assert set(event) == FIELDS[event["ph"]], event
        assert isinstance(event["name"], str)
        assert event["name"]
        for name in ("pid", "tid"):
            assert isinstance(event.get(name, 0), int)
        for name in ("ts", "dur"):
            assert isinstance(event.get(name, 0.0), int | float)
            assert not isinstance(event.get(name), bool)
        assert event.get("dur", 0) >= 0
        assert isinstance(event["args"], dict)


def test_counters_are_numbers_and_processes_are_named_once(events: list[Event]) -> None:
    for event in events:
        if event["ph"] == "C":
            assert event["args"]
            assert all(type(value) in (int, float) for value in event["args"].values())
    named = [event for event in events if event["ph"] == "M"]
    assert {event["name"] for event in named} == {"process_name"}
    assert sorted(event["pid"] for event in named) == sorted({event["pid"] for event in events})


def test_no_two_slices_of_a_row_overlap(events: list[Event]) -> None:
    assert _assert_apart(events) > 10


def _assert_apart(events: list[Event]) -> int:
    """Rows, once looked at in whole nanoseconds, which is what Perfetto makes of times."""
    rows: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            start, length = round(event["ts"] * 1000), round(event["dur"] * 1000)
            rows[event["pid"], event["tid"]].append((start, start + length))
    for spans in rows.values():
        assert all(left[1] <= right[0] for left, right in pairwise(sorted(spans)))
    return len(rows)


def test_a_slice_that_reaches_into_the_next_is_noticed() -> None:
    """The negative control: such a row is what rounding start and length apart can give."""
    rows = [{"ph": "X", "pid": 1, "tid": 1, "ts": 0.0, "dur": 1.001},
            {"ph": "X", "pid": 1, "tid": 1, "ts": 1.0, "dur": 1.0}]  # fmt: skip
    with pytest.raises(AssertionError):
        _assert_apart(rows)


def test_every_step_and_every_request_with_a_token_is_there(
    events: list[Event], played: tuple[list[Step], list[RequestRecord]]
) -> None:
    steps, records = played
    slices = [event for event in events if event["ph"] == "X"]
    shown = [event for event in slices if event["cat"] == "step"]
    assert len(shown) == len(steps) == sum(event["ph"] == "C" for event in events)
    assert sum("(stopped)" in e["name"] for e in shown) == sum(s.stopped for s in steps) > 0
    for event, step in zip(shown, steps, strict=True):
        tokens = event["args"]["online_tokens"] + event["args"]["offline_tokens"]
        assert tokens == sum(step.grants.values())
        assert event["ts"] == pytest.approx(step.start_s * 1e6, abs=1e-3)
        assert event["ts"] + event["dur"] == pytest.approx(step.end_s * 1e6, abs=2e-3)
    with_tokens = [r for r in records if r.token_times_s]
    assert sum(event["cat"] == "request" for event in slices) == 2 * len(with_tokens)
