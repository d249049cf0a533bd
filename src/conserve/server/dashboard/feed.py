"""The stream of server-sent events behind the page and `conserve top`.

hello     facts, the names of a point's columns, and the history: once, first
tick      the summary, and the points made since the one before: about once a second
events    the last notable events, newest first: when there are new ones
batches   the caller's newest batches: when they have changed
bye       the server is stopping; the last
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from conserve.batch.errors import BatchError
from conserve.batch.service import BatchService
from conserve.batch.wire import BatchObject
from conserve.server.dashboard.collector import Collector
from conserve.server.dashboard.history import COLUMNS, Point, columns

BATCHES_SHOWN = 50
BATCHES_EVERY_S = 2.0
LONGEST_WAIT_S = 2.0
"""Between two looks at whether the server is leaving."""
NAME_LENGTH = 120
NAME_KEYS = ("name", "title", "description")
"""Of a batch's metadata: the first there is names the batch on the page."""


class BatchLists:
    """Each tenant's newest batches as an event, looked up once for all who watch."""

    def __init__(self, service: BatchService) -> None:
        self._service = service
        self._known: dict[str, tuple[float, bytes]] = {}

    async def event(self, tenant: str) -> bytes:
        now_s = time.monotonic()
        self._known = {
            name: known for name, known in self._known.items() if now_s - known[0] < BATCHES_EVERY_S
        }
        if tenant not in self._known:
            self._known[tenant] = (now_s, await self._look_up(tenant))
        return self._known[tenant][1]

    async def _look_up(self, tenant: str) -> bytes:
        try:
            found, more = await self._service.batch_page(tenant, None, BATCHES_SHOWN)
        except BatchError as error:
            return encode("batches", {"error": error.message, "data": [], "has_more": False})
        data = [shown(batch) for batch in found]
        return encode("batches", {"error": None, "data": data, "has_more": more})


def shown(batch: BatchObject) -> dict[str, Any]:
    """What the page shows of a batch. Its texts are its owner's: for text nodes only."""
    metadata = batch.metadata or {}
    name = next((metadata[key] for key in NAME_KEYS if metadata.get(key)), None)
    errors = batch.errors.data if batch.errors else []
    return {
        **batch.model_dump(include=SHOWN),
        "request_counts": batch.request_counts.model_dump(),
        "name": name[:NAME_LENGTH] if name else None,
        "error": errors[0].message[: 2 * NAME_LENGTH] if errors else None,
        "tokens": batch.usage.total_tokens,
    }


SHOWN = {
    "id", "endpoint", "status", "priority", "progress", "created_at", "in_progress_at", "deadline",
    "expires_at", "deadline_state", "estimated_finish_at",
}  # fmt: skip


async def stream(
    collector: Collector, batches: BatchLists | None, tenant: str
) -> AsyncIterator[bytes]:
    """The events for one who watches, until the server leaves."""
    seen, since_s = collector.num_looks, _newest_s(collector)
    yield hello(collector)
    yield tick(collector, since_s)
    told: dict[str, bytes] = {}
    while not collector.status.leaving():
        news = [encode("events", collector.newest_events())]
        if batches is not None:
            news.append(await batches.event(tenant))
        for event in news:
            kind = event.partition(b"\n")[0].decode()
            if told.get(kind) != event:
                told[kind] = event
                yield event
        looks = await collector.changed(seen, LONGEST_WAIT_S)
        if looks > seen:
            news_since_s, seen, since_s = since_s, looks, _newest_s(collector)
            yield tick(collector, news_since_s)
    yield encode("bye", {"text": "The server is stopping."})


def hello(collector: Collector) -> bytes:
    history = collector.history
    about = {
        "facts": asdict(collector.facts),
        "columns": COLUMNS,
        "fine": columns(history.fine),
        "coarse": columns(history.coarse),
    }
    return encode("hello", about)


def tick(collector: Collector, since_s: float) -> bytes:
    history = collector.history
    points = {
        "fine": _newer(history.fine, since_s),
        "coarse": _newer(history.coarse, since_s),
    }
    return encode("tick", {"summary": collector.summary, **points})


def _newer(points: Sequence[Point], since_s: float) -> list[Point]:
    found: list[Point] = []
    for point in reversed(points):
        if (point[0] or 0.0) <= since_s:
            break
        found.append(point)
    return found[::-1]


def _newest_s(collector: Collector) -> float:
    fine = collector.history.fine
    return (fine[-1][0] or 0.0) if fine else 0.0


def encode(event: str, data: Any) -> bytes:
    """One server-sent event; JSON has no line breaks of its own."""
    return b"event: %s\ndata: %s\n\n" % (event.encode(), msgspec.json.encode(data))
