"""The store in a few numbers, and the names lines have in the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import Request
from prometheus_client import CollectorRegistry, Counter

from conserve.batch.overview import overview
from conserve.batch.settings import BatchSettings
from conserve.batch.waits import Waits
from conserve.server.batches.metrics import SERIES, BatchMetrics, batch_metrics, shown
from tests.batch.batch_fakes import FakeModel, eventually, running
from tests.batch.builders import jsonl, line, numbered

pytestmark = pytest.mark.anyio


async def test_it_counts_batches_and_lines(settings: BatchSettings) -> None:
    async with running(settings) as run:
        stores = run.service.stores
        await stores.prepare()
        empty = await overview(stores, time.time())
        assert (empty.statuses, empty.live_remaining, empty.finish_s) == ({}, 0, None)
        good = await run.submit(numbered(5))
        bad = await run.submit(jsonl([line("good", "hi"), line("bad", "fail:400:99")]))
        for batch in (good, bad):
            await run.until(batch.id, "completed")
        seen = await overview(stores, time.time())
    assert seen.statuses == {"completed": 2}
    assert (seen.completed, seen.failed) == (6, 1)
    assert (seen.input_tokens, seen.output_tokens) == (18, 12)
    assert (seen.live_completed, seen.live_failed, seen.live_remaining) == (0, 0, 0)
    assert not seen.deadlines


async def test_it_tells_of_live_batches(settings: BatchSettings) -> None:
    model = FakeModel()
    model.open.clear()
    async with running(settings, model) as run:
        batch = await run.submit(numbered(5), deadline="1h")
        await run.until(batch.id, "in_progress")
        seen = await overview(run.service.stores, time.time())
        late = await overview(run.service.stores, time.time() + 7200)
        model.open.set()
        await run.until(batch.id, "completed")
    assert seen.statuses == {"in_progress": 1}
    assert seen.live_remaining == 5
    assert seen.remaining_tokens > 0
    assert seen.deadlines == {"unknown": 1}
    assert late.deadlines == {"will_miss": 1}


async def test_lines_of_paused_batches_are_not_left_to_run(settings: BatchSettings) -> None:
    """An alert watches over those that are: none of a paused batch ends, for as long as it is."""
    model, registry = FakeModel(), CollectorRegistry()
    model.open.clear()

    def live_lines(state: str) -> float | None:
        return registry.get_sample_value("conserve:batch_live_lines", {"state": state})

    async with running(settings, model) as run:
        stores, metrics = run.service.stores, BatchMetrics(registry)
        paused, other = await run.submit(numbered(5)), await run.submit(numbered(3))
        for batch in (paused, other):
            await run.until(batch.id, "in_progress")
        await run.client.post(f"/batches/{paused.id}/pause", cast_to=object)
        metrics.set(await overview(stores, time.time()))
        assert (live_lines("remaining"), live_lines("paused")) == (3, 5)
        await run.client.post(f"/batches/{paused.id}/resume", cast_to=object)
        metrics.set(await overview(stores, time.time()))
        assert (live_lines("remaining"), live_lines("paused")) == (8, 0)
        model.open.set()
        for batch in (paused, other):
            await run.until(batch.id, "completed")
        metrics.set(await overview(stores, time.time()))
        assert (live_lines("remaining"), live_lines("paused")) == (0, 0)


async def test_the_engine_knows_lines_by_batch_and_number(settings: BatchSettings) -> None:
    model, names = FakeModel(), set()

    @model.app.middleware("http")
    async def note(request: Request, call_next: Callable[[Request], Any]) -> Any:
        names.add(request.headers.get("x-request-id"))
        return await call_next(request)

    async with running(settings, model) as run:
        batch = await run.submit(numbered(3))
        await run.until(batch.id, "completed")
    assert names - {None} == {f"{batch.id}-{n}" for n in (1, 2, 3)}


async def test_the_exporter_follows_the_store(settings: BatchSettings) -> None:
    registry = CollectorRegistry()
    async with (
        running(settings) as run,
        batch_metrics(run.service.stores, time.time, registry=registry, every_s=0.05),
    ):
        await eventually(lambda: lines(registry) == 0)
        batch = await run.submit(numbered(4))
        await run.until(batch.id, "completed")
        await eventually(lambda: lines(registry) == 4)
        done = {"status": "completed"}
        await eventually(lambda: registry.get_sample_value("conserve:batches", done) == 1)
        assert registry.get_sample_value("conserve:batch_finish_seconds") == 0
    assert not list(registry.collect()), "nothing is left behind"


def lines(registry: CollectorRegistry) -> float | None:
    return registry.get_sample_value("conserve:batch_lines_total", {"outcome": "completed"})


async def test_what_others_counted_is_not_counted_again(settings: BatchSettings) -> None:
    registry = CollectorRegistry()
    async with running(settings) as run:
        batch = await run.submit(numbered(3))
        await run.until(batch.id, "completed")
        metrics = BatchMetrics(registry)
        metrics.set(await overview(run.service.stores, time.time()))
        assert lines(registry) == 0
        batch = await run.submit(numbered(2))
        await run.until(batch.id, "completed")
        seen = await overview(run.service.stores, time.time())
        metrics.set(seen)
        metrics.set(seen)
        assert lines(registry) == 2


async def test_every_series_has_the_labels_it_declares(settings: BatchSettings) -> None:
    async with running(settings) as run:
        await run.service.stores.prepare()
        found = shown(await overview(run.service.stores, time.time()), Waits())
    for series in SERIES:
        if series.name in found:
            assert tuple(found[series.name]) == (series.values or ("",))
            assert (series.kind is Counter) == (series.name in ("batch_lines", "batch_tokens"))


async def test_what_is_known_no_more_is_no_number(settings: BatchSettings) -> None:
    registry = CollectorRegistry()
    metrics = BatchMetrics(registry)
    model = FakeModel()
    model.open.clear()
    async with running(settings, model) as run:
        await run.service.stores.prepare()
        metrics.set(await overview(run.service.stores, time.time()))
        assert registry.get_sample_value("conserve:batch_finish_seconds") == 0
        batch = await run.submit(numbered(3))
        await run.until(batch.id, "in_progress")
        metrics.set(await overview(run.service.stores, time.time()))
        value = registry.get_sample_value("conserve:batch_finish_seconds")
        assert value is not None
        assert math.isnan(value)
        model.open.set()
        await run.until(batch.id, "completed")
