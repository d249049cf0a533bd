"""`conserve:batch*` on /metrics: what the store says of its batches."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from conserve.batch.deadlines import LiveDeadlineState
from conserve.batch.errors import StoreUnavailableError
from conserve.batch.lifecycle import Status
from conserve.batch.outage import Outage
from conserve.batch.overview import Overview, overview
from conserve.batch.stores import Stores
from conserve.batch.waits import Waits
from conserve.server.lifespan import running

logger = logging.getLogger(__name__)

EVERY_S = 5.0

Models = Callable[[], Awaitable[Collection[str] | None]]
"""Those served here; None is any. Raises StoreUnavailableError."""


@dataclass(frozen=True, slots=True)
class Series:
    """One exported series. `values` are all that its label can have."""

    name: str
    kind: type[Gauge] | type[Counter]
    help: str
    label: str = ""
    values: tuple[str, ...] = ()


SERIES = (
    Series("batches", Gauge, "Batches in the store.", "status", tuple(map(str, Status))),
    Series(
        "batch_deadlines",
        Gauge,
        "Live batches by how their deadline looks.",
        "state",
        get_args(LiveDeadlineState),
    ),
    Series(
        "batch_live_lines",
        Gauge,
        "Lines of live batches; what is left of paused ones is `paused`.",
        "state",
        ("completed", "failed", "remaining", "paused"),
    ),
    Series("batch_remaining_tokens", Gauge, "Tokens that live batches are expected to take."),
    Series("batch_finish_seconds", Gauge, "Time until the last live batch is expected to end."),
    Series(
        "batch_oldest_wait_seconds",
        Gauge,
        "Longest time that a live batch has had no line end, or none since it was made.",
    ),
    Series(
        "batch_harvest_tokens_per_second",
        Gauge,
        "Tokens a second that batches got while they had lines in flight, over the last hour.",
    ),
    Series(
        "batch_workers_needed",
        Gauge,
        "Workers that keep every deadline of batches of this server's models, each as fast as "
        "one was over the last hour.",
    ),
    Series("batch_lines", Counter, "Lines that have ended.", "outcome", ("completed", "failed")),
    Series("batch_tokens", Counter, "Usage of lines that have ended.", "kind", ("input", "output")),
)


def shown(seen: Overview, waits: Waits) -> dict[str, dict[str, float]]:
    """Series -> label value -> number; what is not known is not there. `waits` has been told of
    the looks before."""
    found: dict[str, dict[str, float]] = {
        "batches": {str(status): seen.statuses.get(status, 0) for status in Status},
        "batch_deadlines": {
            state: seen.deadlines.get(state, 0) for state in get_args(LiveDeadlineState)
        },
        "batch_live_lines": {
            "completed": seen.live_completed,
            "failed": seen.live_failed,
            "remaining": seen.live_remaining - seen.live_paused,
            "paused": seen.live_paused,
        },
        "batch_remaining_tokens": {"": seen.remaining_tokens},
        "batch_oldest_wait_seconds": {"": waits.longest_s(seen.views, seen.now_s)},
        "batch_workers_needed": {"": seen.workers_needed},
        "batch_lines": {"completed": seen.completed, "failed": seen.failed},
        "batch_tokens": {"input": seen.input_tokens, "output": seen.output_tokens},
    }
    # Without a live batch there is nothing left to wait for.
    finish_s = seen.finish_s if seen.deadlines else 0.0
    if finish_s is not None:
        found["batch_finish_seconds"] = {"": finish_s}
    if seen.harvest_tokens_per_s is not None:
        found["batch_harvest_tokens_per_second"] = {"": seen.harvest_tokens_per_s}
    return found


class BatchMetrics:
    """Made once a process. In several API processes the figures of the newest look stand."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._waits = Waits()
        self._series: dict[str, Any] = {}
        self._counted: Mapping[str, Mapping[str, float]] = {}

    def set(self, seen: Overview) -> None:
        """What was counted before our first look was counted by somebody else's series."""
        found = shown(seen, self._waits)
        for series in SERIES:
            for label, value in found.get(series.name, {}).items():
                child = self._child(series, label)
                if series.kind is Gauge:
                    child.set(value)
                else:
                    before = self._counted.get(series.name, {}).get(label, value)
                    child.inc(max(0.0, value - before))
            if series.kind is Gauge and series.name in self._series and series.name not in found:
                self._series[series.name].set(math.nan)  # it was known, and is no more
        self._counted = found

    def _child(self, series: Series, label: str) -> Any:
        """Made when there is first something to show, so that an absent figure is no zero."""
        if series.name not in self._series:
            name, labels = f"conserve:{series.name}", [series.label] if series.label else []
            options: dict[str, Any] = {"registry": self._registry}
            if series.kind is Gauge:
                options["multiprocess_mode"] = "mostrecent"
            made = series.kind(name, series.help, labels, **options)
            self._series[series.name] = made
        found = self._series[series.name]
        return found.labels(label) if series.label else found

    def close(self) -> None:
        for made in self._series.values():
            self._registry.unregister(made)


async def any_model() -> None:
    return None


@asynccontextmanager
async def batch_metrics(
    stores: Stores,
    clock: Callable[[], float],
    models: Models = any_model,
    registry: CollectorRegistry = REGISTRY,
    every_s: float = EVERY_S,
) -> AsyncIterator[None]:
    """Export, for as long as the block runs. A store that is away leaves the figures as they were;
    they are exported once it has been there."""
    metrics = BatchMetrics(registry)
    outage = Outage(logger, "the figures of batches stay as they were")

    async def look() -> None:
        while True:
            with outage.survived():
                await stores.prepare()
                metrics.set(await overview(stores, clock(), await _names(models)))
            await asyncio.sleep(every_s)

    try:
        async with running(look(), "conserve-batch-metrics"):
            yield
    finally:
        metrics.close()


async def _names(models: Models) -> Collection[str] | None:
    """All where it is not known: rather a server too many than a deadline missed."""
    try:
        return await models()
    except StoreUnavailableError:
        return None
