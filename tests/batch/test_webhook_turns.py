"""An endpoint that hangs keeps no other owner's events waiting, however many it has."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy import insert

from conserve.batch import schema, webhooks
from conserve.batch.errors import StoreUnavailableError
from conserve.batch.stores import Stores
from conserve.batch.webhook_store import Event
from conserve.batch.webhooks import LONGEST_SILENCE_S, Endpoint, delay_s
from tests.batch.batch_fakes import FakeClock, eventually
from tests.batch.test_batch_quota import limits_file
from tests.batch.test_batch_webhooks import SECRET, Ear, listening, opened

pytestmark = pytest.mark.anyio

HANGS, ANSWERS = "a" * 64, "b" * 64
BOUND = webhooks.ENDPOINT_AT_ONCE


@contextmanager
def hanging() -> Iterator[tuple[str, list[socket.socket]]]:
    """URL of an endpoint that takes connections and says nothing, and who has come."""
    came: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    came.append(listener.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/", came
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for each in came:
                each.close()


@contextmanager
def two_owners(folder: Path) -> Iterator[tuple[Path, Ear, list[socket.socket]]]:
    """Limits in which one owner's endpoint hangs and another's answers."""
    with listening() as ear, hanging() as (url, came):
        hooks = {
            owner: {"webhook": {"url": where, "secret": SECRET, "allow_private": True}}
            for owner, where in ((HANGS, url), (ANSWERS, ear.url))
        }
        yield limits_file(folder, hooks), ear, came


async def put_down(stores: Stores, batch_id: str, tenant: str) -> None:
    row = {"batch_id": batch_id, "tenant": tenant, "status": "completed"}
    times = {"created_at": stores.webhooks._clock(), "attempts": 0, "not_before": 0.0}
    async with stores.database.write() as connection:
        await connection.execute(insert(schema.webhooks).values(**row, **times))


async def others_are_told(folder: Path, database_url: str, clock: FakeClock) -> None:
    """A hundred events of the owner whose endpoint hangs, before each of another's."""
    with two_owners(folder) as (limits, ear, came):
        stores = await opened(folder, database_url, clock, limits)
        for number in range(100):
            await put_down(stores, f"batch_{number}", HANGS)
        await put_down(stores, "batch_other", ANSWERS)
        telling = asyncio.create_task(stores.webhooks.deliver())
        try:
            await eventually(lambda: len(ear.heard) == 1)
            await put_down(stores, "batch_later", ANSWERS)  # while the tries hang
            await eventually(lambda: len(ear.heard) == 2)
            assert len(came) <= BOUND
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            await stores.close()


async def test_others_are_told_while_an_endpoint_hangs(
    tmp_path: Path, database_url: str, clock: FakeClock
) -> None:
    await others_are_told(tmp_path, database_url, clock)


async def test_control_without_a_bound_it_has_every_place(
    tmp_path: Path, database_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "ENDPOINT_AT_ONCE", webhooks.AT_ONCE)
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 0.5)  # the others' turn comes after it
    with pytest.raises(AssertionError):
        await others_are_told(tmp_path, database_url, clock)


async def test_a_silent_endpoint_is_left_alone_and_then_asked_once(
    tmp_path: Path, database_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 0.05)
    with two_owners(tmp_path) as (limits, _, came):
        stores = await opened(tmp_path, database_url, clock, limits)
        for number in range(20):
            await put_down(stores, f"batch_{number}", HANGS)
        await stores.webhooks.deliver()
        assert len(came) <= webhooks.ENDPOINT_AT_ONCE
        before = len(came)
        await stores.webhooks.deliver()
        assert len(came) == before
        clock.advance(LONGEST_SILENCE_S)
        await stores.webhooks.deliver()
        assert len(came) <= before + 1
        await stores.close()


async def test_an_outage_between_two_owners_leaves_no_try_behind(
    tmp_path: Path, database_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with two_owners(tmp_path) as (limits, _, _):
        stores = await opened(tmp_path, database_url, clock, limits)
        await put_down(stores, "batch_first", HANGS)
        await put_down(stores, "batch_other", ANSWERS)
        take = stores.webhooks._store.take

        async def one(tenant: str, limit: int) -> list[Event]:
            if sum(each.num_tries for each in stores.webhooks._endpoints.values()):
                raise StoreUnavailableError("gone")
            return await take(tenant, limit)

        monkeypatch.setattr(stores.webhooks._store, "take", one)
        with pytest.raises(StoreUnavailableError):
            await stores.webhooks.deliver()
        assert [each.num_tries for each in stores.webhooks._endpoints.values()] == [0, 0]
        await stores.close()


def test_how_long_it_is_left_alone() -> None:
    endpoint, now = Endpoint(), 100.0
    assert endpoint.room(now) == webhooks.ENDPOINT_AT_ONCE
    for silent in range(1, 8):
        for _ in range(webhooks.ENDPOINT_AT_ONCE):
            endpoint.is_silent(now)
        wait_s = min(LONGEST_SILENCE_S, delay_s(silent))
        assert (endpoint.room(now + wait_s - 0.001), endpoint.room(now + wait_s)) == (0, 1)
        now += wait_s
    endpoint.answers()
    assert endpoint.room(now) == webhooks.ENDPOINT_AT_ONCE


async def test_an_answer_that_is_an_error_holds_up_nothing_else(
    tmp_path: Path, database_url: str, clock: FakeClock
) -> None:
    with two_owners(tmp_path) as (limits, ear, _):
        stores = await opened(tmp_path, database_url, clock, limits)
        ear.statuses = [500]
        for number in range(10):
            await put_down(stores, f"batch_{number}", ANSWERS)
        await stores.webhooks.deliver()
        assert len(ear.heard) == 10
        await stores.close()
