"""The stream of server-sent events behind the page and `conserve top`; `messages` says what is in
each."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence

from conserve.batch.errors import BatchError
from conserve.batch.lifecycle import CANCELLABLE, TERMINAL, Status
from conserve.batch.service import BatchService
from conserve.batch.wire import BatchObject
from conserve.server.dashboard.collector import Collector
from conserve.server.dashboard.messages import (
    COLUMNS,
    Batch,
    Batches,
    Bye,
    Counts,
    Hello,
    LastEvents,
    Message,
    Point,
    Tick,
    encode,
)

BATCHES_SHOWN = 50
BATCHES_EVERY_S = 2.0
LONGEST_WAIT_S = 2.0
"""Between two looks at whether the server is leaving."""
NAME_LENGTH = 120
NAME_KEYS = ("name", "title", "description")
"""Of a batch's metadata: the first there is names the batch on the page."""


class BatchLists:
    """Each tenant's newest batches, looked up once for all who watch."""

    def __init__(self, service: BatchService) -> None:
        self._service = service
        self._known: dict[str, tuple[float, Batches]] = {}

    async def of(self, tenant: str) -> Batches:
        now_s = time.monotonic()
        self._known = {
            name: known for name, known in self._known.items() if now_s - known[0] < BATCHES_EVERY_S
        }
        if tenant not in self._known:
            self._known[tenant] = (now_s, await self._look_up(tenant))
        return self._known[tenant][1]

    async def _look_up(self, tenant: str) -> Batches:
        try:
            found, more = await self._service.batch_page(tenant, None, BATCHES_SHOWN)
        except BatchError as error:
            return Batches(error=error.message, data=[], has_more=False)
        return Batches(error=None, data=[shown(batch) for batch in found], has_more=more)


def shown(batch: BatchObject) -> Batch:
    metadata = batch.metadata or {}
    name = next((metadata[key] for key in NAME_KEYS if metadata.get(key)), None)
    errors = batch.errors.data if batch.errors else []
    counts = batch.request_counts
    return Batch(
        id=batch.id,
        endpoint=batch.endpoint,
        status=Status(batch.status),
        is_ended=batch.status in TERMINAL,
        is_cancellable=batch.status in CANCELLABLE,
        is_paused=batch.paused_at is not None,
        created_at=batch.created_at,
        in_progress_at=batch.in_progress_at,
        expires_at=batch.expires_at,
        priority=batch.priority,
        deadline=batch.deadline,
        deadline_state=batch.deadline_state,
        progress=batch.progress,
        estimated_finish_at=batch.estimated_finish_at,
        request_counts=Counts(counts.total, counts.completed, counts.failed),
        name=name[:NAME_LENGTH] if name else None,
        error=errors[0].message[: 2 * NAME_LENGTH] if errors else None,
        tokens=batch.usage.total_tokens,
    )


async def stream(
    collector: Collector, batches: BatchLists | None, tenant: str
) -> AsyncIterator[bytes]:
    """The messages for one who watches, until the server leaves."""
    seen, since_s = collector.num_looks, _newest_s(collector)
    yield encode(hello(collector))
    yield encode(tick(collector, since_s))
    told: dict[type, Message] = {}
    while not collector.status.leaving():
        news: list[Message] = [LastEvents(collector.events.newest())]
        if batches is not None:
            news.append(await batches.of(tenant))
        for message in news:
            if told.get(type(message)) != message:
                told[type(message)] = message
                yield encode(message)
        looks = await collector.changed(seen, LONGEST_WAIT_S)
        if looks > seen:
            news_since_s, seen, since_s = since_s, looks, _newest_s(collector)
            yield encode(tick(collector, news_since_s))
    yield encode(Bye("The server is stopping."))


def hello(collector: Collector) -> Hello:
    history = collector.history
    return Hello(collector.facts, COLUMNS, fine=list(history.fine), coarse=list(history.coarse))


def tick(collector: Collector, since_s: float) -> Tick:
    history = collector.history
    fine, coarse = _newer(history.fine, since_s), _newer(history.coarse, since_s)
    return Tick(collector.summary, fine, coarse)


def _newer(points: Sequence[Point], since_s: float) -> list[Point]:
    found: list[Point] = []
    for point in reversed(points):
        if point.time_s <= since_s:
            break
        found.append(point)
    return found[::-1]


def _newest_s(collector: Collector) -> float:
    fine = collector.history.fine
    return fine[-1].time_s if fine else 0.0
