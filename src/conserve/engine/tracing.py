"""What vLLM's span of a request says beyond vLLM's own words: its class, and what befell it.

The engine writes it into the request's trace headers, which vLLM carries back with every output;
the API process copies it to the span. So it is bounded, and costs nothing while tracing is off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from functools import wraps
from inspect import signature
from typing import Any

from conserve.engine.queue import is_online

CLASS = "conserve.class"
STOPS = "conserve.stops"
DISPLACEMENTS = "conserve.displacements"
RESTORES = "conserve.restores"
BATCH_ID = "conserve.batch.id"
BATCH_LINE = "conserve.batch.line"

LINE_OF_A_BATCH = re.compile(r"(batch_[0-9a-f]{32})-([0-9]+)")
"""What the batch service asks vLLM to name its requests; vLLM adds to both ends."""

_notes: ContextVar[Mapping[str, str | int]] = ContextVar("conserve_span_notes", default={})  # noqa: B039


class TraceNotes:
    """The engine's half: does nothing unless `enabled`."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled

    def came(self, request: Any) -> None:
        if self._enabled:
            label = "online" if is_online(request) else "offline"
            request.trace_headers = {**(request.trace_headers or {}), CLASS: label}

    def stopped(self, request: Any) -> None:
        """Its tokens of one step were dropped."""
        self._count(request, STOPS)

    def displaced(self, request: Any) -> None:
        self._count(request, DISPLACEMENTS)

    def ran(self, requests: Iterable[Any]) -> None:
        """Whoever computes again after a displacement has been restored."""
        if self._enabled:
            for request in requests:
                gone = request.trace_headers.get(DISPLACEMENTS)
                if gone is not None:
                    request.trace_headers[RESTORES] = gone

    def _count(self, request: Any, name: str) -> None:
        if self._enabled:
            headers = request.trace_headers
            headers[name] = str(int(headers.get(name, 0)) + 1)


def span_attributes(headers: Mapping[str, str] | None, request_id: str) -> dict[str, str | int]:
    """Ours, from a finished request's headers and from the id its client sees."""
    if headers is None or CLASS not in headers:
        return {}
    counts = {name: int(headers.get(name, 0)) for name in (STOPS, DISPLACEMENTS, RESTORES)}
    found: dict[str, str | int] = {CLASS: headers[CLASS], **counts}
    line = LINE_OF_A_BATCH.search(request_id)
    if line and headers[CLASS] == "offline":
        found |= {BATCH_ID: line[1], BATCH_LINE: int(line[2])}
    return found


def say_more_in_spans(module: Any) -> None:
    """The API process's half: wrap vLLM's module that makes a span of every finished request."""
    do_tracing = module.OutputProcessor.do_tracing
    instrument_manual = module.instrument_manual

    @wraps(do_tracing)
    def noted(self: Any, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
        found = span_attributes(engine_core_output.trace_headers, req_state.external_req_id)
        token = _notes.set(found)
        try:
            do_tracing(self, engine_core_output, req_state, iteration_stats)
        finally:
            _notes.reset(token)

    @wraps(instrument_manual)
    def with_notes(*args: Any, **kwargs: Any) -> Any:
        call = signature(instrument_manual).bind(*args, **kwargs)
        call.arguments["attributes"] = {**(call.arguments.get("attributes") or {}), **_notes.get()}
        return instrument_manual(*call.args, **call.kwargs)

    module.OutputProcessor.do_tracing = noted
    module.instrument_manual = with_notes
