"""How many servers deadlines ask for: enough, and no more because work merely waits."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from conserve.batch.deadlines import BatchView, RecentHarvest
from conserve.batch.demand import START_S, workers_needed
from conserve.batch.errors import StoreUnavailableError
from conserve.batch.overview import overview
from conserve.batch.settings import BatchSettings
from conserve.server.batches.metrics import batch_metrics
from tests.batch.batch_fakes import FakeModel, eventually, running
from tests.batch.builders import MODEL, numbered

HOUR = 3600.0
TWO_WORKERS = RecentHarvest(tokens_per_s=200.0, num_workers=2)


def due(in_s: float, tokens: float) -> BatchView:
    return BatchView("batch", 0.0, 10, in_s, tokens)


def needed(*views: BatchView, harvest: RecentHarvest = TWO_WORKERS) -> float:
    return workers_needed(views, 0.0, harvest)


def test_a_backlog_that_ends_in_time_asks_for_no_more_than_there_is() -> None:
    assert needed(due(24 * HOUR, 1.5 * 100 * 24 * HOUR)) == 1.5


def test_a_batch_that_will_miss_asks_for_as_many_as_keep_it() -> None:
    assert needed(due(HOUR, 5 * 100 * HOUR)) == 5


def test_who_is_there_does_not_change_what_is_needed() -> None:
    """Or servers that have been added would ask for more of them."""
    views = [due(HOUR, 5 * 100 * HOUR)]
    many = replace(TWO_WORKERS, tokens_per_s=1000.0, num_workers=10)
    assert workers_needed(views, 0.0, many) == needed(*views)


def test_the_nearest_deadlines_go_first_and_the_tightest_counts() -> None:
    near, far = due(HOUR, 100 * HOUR), due(10 * HOUR, 29 * 100 * HOUR)
    assert needed(near, far) == needed(far, near) == 3
    assert needed(due(HOUR, 4 * 100 * HOUR), far) == 4


def test_what_is_due_before_a_server_could_start_asks_for_few() -> None:
    assert needed(due(1.0, 100.0)) == pytest.approx(1.0 / START_S)


def test_what_is_overdue_asks_for_nothing() -> None:
    assert needed(due(0.0, 1e9)) == 0


@pytest.mark.parametrize(("views", "workers"), [([], 0), ([due(HOUR, 1e9)], 1)])
def test_while_no_rate_is_known_one_finds_it(views: list[BatchView], workers: int) -> None:
    assert needed(*views, harvest=RecentHarvest()) == workers


@pytest.mark.anyio
async def test_a_server_asks_for_what_it_can_help(settings: BatchSettings) -> None:
    model = FakeModel()
    model.open.clear()
    async with running(settings, model) as run:
        batch = await run.submit(numbered(3))
        await run.until(batch.id, "in_progress")
        for served, workers in [(None, 1), ({MODEL}, 1), ({"another"}, 0)]:
            seen = await overview(run.service.stores, time.time(), served)
            assert seen.workers_needed == workers
        assert await run.service.models() == frozenset({MODEL})
        model.open.set()
        await run.until(batch.id, "completed")
        # Its names are one server's, whose batches share it out.
        assert run.service.stores.lookout.served == {MODEL}


@pytest.mark.anyio
async def test_where_models_are_unknown_every_batch_counts(settings: BatchSettings) -> None:
    async def unknown() -> None:
        raise StoreUnavailableError("The server does not say which models it has.")

    async def another() -> set[str]:
        return {"another"}

    model, blind, other = FakeModel(), CollectorRegistry(), CollectorRegistry()
    model.open.clear()
    async with (
        running(settings, model) as run,
        batch_metrics(run.service.stores, time.time, unknown, blind, every_s=0.05),
        batch_metrics(run.service.stores, time.time, another, other, every_s=0.05),
    ):
        batch = await run.submit(numbered(3))
        await run.until(batch.id, "in_progress")
        await eventually(lambda: asked(blind) == 1)
        await eventually(lambda: asked(other) == 0)
        model.open.set()
        await run.until(batch.id, "completed")


def asked(registry: CollectorRegistry) -> float | None:
    return registry.get_sample_value("conserve:batch_workers_needed")
