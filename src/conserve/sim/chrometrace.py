"""A run as a Chrome trace: open it in Perfetto (ui.perfetto.dev) or chrome://tracing.

The format is "Trace Event Format" (Google, 2016): complete events (X) for steps and for the
life of each request, counters (C) for tokens a step, times in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conserve.metrics import RequestRecord
from conserve.sim.step import Step

ENGINE, ONLINE, OFFLINE = 1, 2, 3
"""Process ids of the three groups of rows."""


def write_trace(path: Path, steps: Sequence[Step], records: Sequence[RequestRecord]) -> None:
    """The bytes depend on the arguments alone."""
    events = [_name(ENGINE, "engine"), _name(ONLINE, "online"), _name(OFFLINE, "offline")]
    for step in steps:
        events += _step_events(step)
    for pid, online in ((ONLINE, True), (OFFLINE, False)):
        rows = _Rows()
        chosen = [r for r in records if r.online == online and r.token_times_s]
        for record in sorted(chosen, key=lambda r: (r.arrival_s, r.request_id)):
            events += _request_events(record, pid, rows)
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")


def _name(pid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}


def _us(seconds: float) -> float:
    """Microseconds to the nanosecond, which is as fine as Perfetto keeps them."""
    return round(seconds * 1e6, 3)


def _span(start_s: float, end_s: float) -> dict[str, float]:
    """A duration is the difference of rounded times: rounded by itself, a slice could reach past
    the start of the next one in its row, and Perfetto drops slices that overlap."""
    start, end = _us(start_s), _us(end_s)
    return {"ts": start, "dur": round(end - start, 3)}


def _step_events(step: Step) -> list[dict[str, Any]]:
    online = step.num_online_tokens
    offline = step.shape.num_tokens - online
    name = f"{step.mode} (stopped)" if step.stopped else str(step.mode)
    args = {
        "requests": len(step.grants),
        "online_tokens": online,
        "offline_tokens": offline,
        "recomputed_tokens": step.num_recomputed_tokens,
        "decodes": step.shape.num_decodes,
        "predicted_ms": round(step.predicted_s * 1e3, 3),
        "stoppable": step.stoppable,
    }
    return [
        {
            "ph": "X", "name": name, "cat": "step", "pid": ENGINE, "tid": 1,
            **_span(step.start_s, step.end_s), "args": args,
        },
        {
            "ph": "C", "name": "tokens a step", "pid": ENGINE, "ts": _us(step.start_s),
            "args": {"online": online, "offline": offline},
        },
    ]  # fmt: skip


class _Rows:
    """The fewest rows in which no two requests overlap."""

    def __init__(self) -> None:
        self._free_s: list[float] = []

    def place(self, start_s: float, end_s: float) -> int:
        for row, free_s in enumerate(self._free_s):
            if free_s <= start_s:
                self._free_s[row] = end_s
                return row + 1
        self._free_s.append(end_s)
        return len(self._free_s)


def _request_events(record: RequestRecord, pid: int, rows: _Rows) -> list[dict[str, Any]]:
    """Two spans in one row: until the first token, and from there to the last."""
    first_s, last_s = record.token_times_s[0], record.token_times_s[-1]
    row = rows.place(record.arrival_s, last_s)
    spans = (("first token", record.arrival_s, first_s), ("tokens", first_s, last_s))
    return [
        {
            "ph": "X", "name": f"{record.request_id}: {what}", "cat": "request", "pid": pid,
            "tid": row, **_span(start_s, end_s),
            "args": {
                "prompt_tokens": record.num_prompt_tokens,
                "output_tokens": record.num_output_tokens,
            },
        }
        for what, start_s, end_s in spans
    ]  # fmt: skip
