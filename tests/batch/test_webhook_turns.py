"""An endpoint that hangs keeps no other owner's events waiting, however many it has."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from conserve.batch import schema, webhook_endpoint, webhooks
from conserve.batch.errors import StoreUnavailableError
from conserve.batch.stores import Stores
from conserve.batch.webhook_endpoint import LONGEST_SILENCE_S, Endpoint, delay_s
from conserve.batch.webhook_store import Event
from conserve.batch.webhooks import GIVE_UP_S
from tests.batch.batch_fakes import PATIENCE_S, FakeClock, eventually
from tests.batch.test_batch_quota import limits_file
from tests.batch.test_batch_webhooks import SECRET, Ear, listening, opened

pytestmark = pytest.mark.anyio

HANGS, ANSWERS = "a" * 64, "b" * 64
BOUND = webhook_endpoint.ENDPOINT_AT_ONCE


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
    monkeypatch.setattr(webhook_endpoint, "ENDPOINT_AT_ONCE", webhooks.AT_ONCE)
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
        assert len(came) <= webhook_endpoint.ENDPOINT_AT_ONCE
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
    assert endpoint.room(now) == webhook_endpoint.ENDPOINT_AT_ONCE
    for silent in range(1, 8):
        for _ in range(webhook_endpoint.ENDPOINT_AT_ONCE):
            endpoint.is_silent(now)
        wait_s = min(LONGEST_SILENCE_S, delay_s(silent))
        assert (endpoint.room(now + wait_s - 0.001), endpoint.room(now + wait_s)) == (0, 1)
        now += wait_s
    endpoint.answers()
    assert endpoint.room(now) == webhook_endpoint.ENDPOINT_AT_ONCE


@pytest.mark.parametrize("reserved", [True, pytest.param(False, id="control: none reserved")])
async def test_many_endpoints_that_hang_keep_no_place_of_one_that_answers(
    tmp_path: Path,
    database_url: str,
    clock: FakeClock,
    reserved: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many they are, and however long a try may take."""
    monkeypatch.setattr(webhooks, "TIMEOUT_S", PATIENCE_S)
    if not reserved:
        monkeypatch.setattr(webhooks, "DOUBTFUL_AT_ONCE", webhooks.AT_ONCE)
    with listening() as ear, hanging() as (url, came):
        # The names of owners are the order in which a database finds them.
        hooks = {f"{n:064x}": f"{url}{n}" for n in range(2 * webhooks.AT_ONCE)}
        hooks[ANSWERS] = ear.url
        told = {
            owner: {"webhook": {"url": where, "secret": SECRET, "allow_private": True}}
            for owner, where in hooks.items()
        }
        stores = await opened(tmp_path, database_url, clock, limits_file(tmp_path, told))
        await put_down(stores, "batch_before", ANSWERS)
        await stores.webhooks.deliver()
        for number, owner in enumerate(hooks):
            await put_down(stores, f"batch_{number}", owner)
        telling = asyncio.create_task(stores.webhooks.deliver())
        most = webhooks.AT_ONCE // 2 if reserved else webhooks.AT_ONCE
        await eventually(lambda: len(came) == most)
        if reserved:
            await eventually(lambda: len(ear.heard) == 2)
        assert len(ear.heard) == 1 + reserved
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        await stores.close()


async def is_asked_in_vain(stores: Stores, clock: FakeClock, times: int) -> None:
    for _ in range(times):
        await stores.webhooks.deliver()
        clock.advance(LONGEST_SILENCE_S)


@pytest.mark.parametrize("is_dead", [True, False])
async def test_old_events_of_a_dead_endpoint_go_together(
    tmp_path: Path,
    database_url: str,
    clock: FakeClock,
    is_dead: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all owners that it is to tell. One that has just fallen silent may be back soon, and
    has been asked about none of them, where all servers were away."""

    async def silent(*_: object) -> int:
        raise TimeoutError

    monkeypatch.setattr(webhooks, "post", silent)
    hook = {"url": "https://dead.example/", "secret": SECRET}
    limits = limits_file(tmp_path, {"default": {"webhook": hook}})
    stores = await opened(tmp_path, database_url, clock, limits)
    for number in range(40):
        await put_down(stores, f"batch_{number}", (HANGS, ANSWERS)[number % 2])
    await is_asked_in_vain(stores, clock, 6 if is_dead else 0)
    clock.advance(GIVE_UP_S)
    await put_down(stores, "batch_new", HANGS)
    await is_asked_in_vain(stores, clock, 1)
    async with stores.database.read() as connection:
        left = set((await connection.execute(select(schema.webhooks.c.batch_id))).scalars())
    assert "batch_new" in left
    assert len(left) == 1 if is_dead else len(left) >= 41 - BOUND
    await stores.close()


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
