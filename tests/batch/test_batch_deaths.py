"""A line that brings the engine down does so a few times, and takes no other line with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from conserve.batch.dispatcher import DEATHS_ALONE, Dispatcher
from conserve.batch.executor import Reply
from conserve.batch.records import SUSPECT_LOSSES
from conserve.batch.served import Served
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from tests.batch.batch_fakes import FakeClock, eventually
from tests.batch.test_batch_contract import OK, batch_in_progress, counts

pytestmark = pytest.mark.anyio

NUM_LINES, KILLER = 8, 4


class Mortal:
    """An engine that dies under line number `killer`, and with it all that it has."""

    def __init__(self, killer: int = 0, *, waits: bool = False) -> None:
        self.dead = asyncio.Event()
        self.num_running = self.most_running = 0
        self._killer = f"-{killer}"
        self._waits = waits
        """Whether all are under way when it dies."""

    async def run(self, url: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            if headers["x-request-id"].endswith(self._killer):
                self.dead.set()
            elif self._waits:
                await self.dead.wait()
            return Reply(503, b"", engine_died=True) if self.dead.is_set() else OK
        finally:
            self.num_running -= 1

    async def models(self) -> None:
        return None

    def serves(self, endpoint: str) -> bool:
        return True

    def room(self) -> int | None:
        return 0 if self.dead.is_set() else None


@asynccontextmanager
async def living(stores: Stores, engine: Mortal, folder: Path) -> AsyncIterator[None]:
    """A server around that engine, which then ends as it does when its engine is dead."""
    worker, stopping = f"worker-{id(engine)}", asyncio.Event()
    await stores.workers.enlist(worker)
    settings = BatchSettings(data_dir=folder, poll_s=0.01)
    served = Served(engine)
    dispatcher = Dispatcher(worker, stores, engine, served, settings, FakeClock())
    running = asyncio.create_task(dispatcher.run(stopping, asyncio.Event()))
    yield
    stopping.set()
    await running
    await stores.workers.retire(worker)


async def die(stores: Stores, engine: Mortal, folder: Path) -> Mortal:
    async with living(stores, engine, folder):
        await eventually(engine.dead.is_set)
    return engine


async def test_it_is_failed_and_the_others_are_answered(stores: Stores, tmp_path: Path) -> None:
    batch_id = await batch_in_progress(stores, NUM_LINES)
    max_losses = BatchSettings().max_losses
    for _ in range(SUSPECT_LOSSES):
        engine = await die(stores, Mortal(KILLER, waits=True), tmp_path)
        assert engine.most_running > 1
    assert await counts(stores, batch_id) == (NUM_LINES, 0, 0)
    for _ in range(DEATHS_ALONE):
        assert await stores.leases.worn_out(max_losses) == []
        engine = await die(stores, Mortal(KILLER), tmp_path)
        assert engine.most_running == 1, "a suspect runs alone"
    (worn,) = await stores.leases.worn_out(max_losses)
    assert worn.line_no == KILLER
    async with living(stores, Mortal(KILLER), tmp_path):
        while (await counts(stores, batch_id))[1] < NUM_LINES - 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert await counts(stores, batch_id) == (NUM_LINES, NUM_LINES - 1, 0)


async def test_one_death_holds_nobody_up(stores: Stores, tmp_path: Path) -> None:
    """Whoever was there runs beside others again: most engines that die do so for reasons of
    their own."""
    batch_id = await batch_in_progress(stores, NUM_LINES)
    await die(stores, Mortal(KILLER, waits=True), tmp_path)
    engine = Mortal(waits=True)
    async with living(stores, engine, tmp_path):
        await eventually(lambda: engine.num_running == NUM_LINES)
        engine.dead.set()
    assert await counts(stores, batch_id) == (NUM_LINES, 0, 0)
