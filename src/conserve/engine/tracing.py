"""What vLLM's span of a request says beyond vLLM's own words: its class, and what befell it.

Both processes write it into the request's trace headers, which vLLM carries to the engine and back
with every output; the API process copies it to the span. So it is bounded, and costs nothing while
tracing is off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from functools import wraps
from inspect import signature
from typing import Any

from conserve.engine.batch_line import current_line
from conserve.engine.queue import is_online

CLASS = "conserve.class"
STOPS = "conserve.stops"
DISPLACEMENTS = "conserve.displacements"
RESTORES = "conserve.restores"
BATCH_ID = "conserve.batch.id"
BATCH_LINE = "conserve.batch.line"

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


def span_attributes(headers: Mapping[str, str] | None) -> dict[str, str | int]:
    """Ours, from a finished request's headers."""
    if headers is None or CLASS not in headers:
        return {}
    counts = {name: int(headers.get(name, 0)) for name in (STOPS, DISPLACEMENTS, RESTORES)}
    found: dict[str, str | int] = {CLASS: headers[CLASS], **counts}
    if BATCH_ID in headers:
        found |= {BATCH_ID: headers[BATCH_ID], BATCH_LINE: int(headers[BATCH_LINE])}
    return found


def say_more_in_spans(module: Any) -> None:
    """The API process's half: wrap vLLM's module that registers every request on its way to the
    engine and makes a span of it at its end."""
    add_request = module.OutputProcessor.add_request
    do_tracing = module.OutputProcessor.do_tracing
    instrument_manual = module.instrument_manual

    @wraps(add_request)
    def with_line(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        line = current_line()
        if line is not None and self.tracing_enabled:
            told = {BATCH_ID: line[0], BATCH_LINE: str(line[1])}
            request.trace_headers = {**(request.trace_headers or {}), **told}
        add_request(self, request, *args, **kwargs)

    @wraps(do_tracing)
    def noted(self: Any, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
        found = span_attributes(engine_core_output.trace_headers)
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

    module.OutputProcessor.add_request = with_line
    module.OutputProcessor.do_tracing = noted
    module.instrument_manual = with_notes
