"""Many workers on one batch in PostgreSQL: none waits while another is in the middle of storing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from conserve.batch import lease_store
from conserve.batch.outcome import Result, Tokens
from conserve.batch.records import Line
from conserve.batch.stores import Stores
from tests.batch.builders import TENANT
from tests.batch.test_batch_contract import batch_in_progress, claim, done

pytestmark = pytest.mark.anyio

PATIENCE_S = 60.0


@asynccontextmanager
async def in_the_middle(
    stores: Stores, worker: str, lines: list[Line], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[None]:
    """Meanwhile the worker has written its lines and results, and not yet counted them."""
    finish, reached, go = lease_store._finish, asyncio.Event(), asyncio.Event()

    async def and_stop(connection: Any, batch_id: str, results: list[Result]) -> None:
        await finish(connection, batch_id, results)
        if results[0].line in lines:
            reached.set()
            await go.wait()

    monkeypatch.setattr(lease_store, "_finish", and_stop)
    storing = asyncio.create_task(stores.leases.record(worker, done(lines)))
    try:
        await reached.wait()
        yield
    finally:
        go.set()
        assert len(await storing) == len(lines)


async def two_workers(stores: Stores) -> tuple[str, list[Line], list[Line]]:
    """A batch of 12 lines, four of them with the worker `a` and four with `b`."""
    batch_id = await batch_in_progress(stores, 12)
    for worker in "ab":
        await stores.workers.enlist(worker)
    of_a = await claim(stores, "a", batch_id, 4)
    return batch_id, of_a, await claim(stores, "b", batch_id, 4)


async def test_nobody_waits_for_one_that_stores(
    shared: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id, of_a, of_b = await two_workers(shared)
    async with asyncio.timeout(PATIENCE_S), in_the_middle(shared, "a", of_a, monkeypatch):
        assert len(await shared.leases.record("b", done(of_b))) == 4
        more = await claim(shared, "b", batch_id, 4)
        assert len(await shared.leases.record("b", done(more))) == 4
    batch = await shared.batches.get(TENANT, batch_id)
    assert batch.completed == 12
    assert batch.output_tokens == sum((one.tokens for one in done(more)), Tokens()).output * 3


async def test_a_batch_is_not_deleted_amid_its_results(
    shared: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be left without it."""
    _, of_a, of_b = await two_workers(shared)
    async with in_the_middle(shared, "a", of_a, monkeypatch):
        deleting = asyncio.create_task(shared.owners.delete(TENANT))
        assert not (await asyncio.wait([deleting], timeout=0.2))[0]
    await deleting
    assert await shared.leases.record("b", done(of_b)) == []
