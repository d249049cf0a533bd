"""The time of day is set back: what was put off until a moment by it comes due all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import update

from conserve.batch import schema, webhook_store, webhooks
from conserve.batch.due import CLOCKS_APART_S, PUT_OFF_S
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.webhook_endpoint import LONGEST_SILENCE_S
from tests.batch.batch_fakes import FakeClock
from tests.batch.test_batch_webhooks import cancelled, hooked, listening, opened

pytestmark = pytest.mark.anyio

DAY_S = 86_400.0


async def is_told_after(folder: Path, database_url: str, clock: FakeClock, put_off_s: float) -> int:
    """How often an owner is told at once of an end that is put off by so much."""
    with listening() as ear:
        stores = await opened(folder, database_url, clock, hooked(folder, ear.url))
        await cancelled(stores)
        async with stores.database.write() as connection:
            later = clock() + put_off_s
            await connection.execute(update(schema.webhooks).values(not_before=later))
        await stores.webhooks.deliver()
        await stores.close()
    return len(ear.heard)


async def test_what_is_put_off_farther_than_anything_is_due(
    tmp_path: Path, database_url: str, clock: FakeClock
) -> None:
    """Since the clock has been set back."""
    assert await is_told_after(tmp_path, database_url, clock, DAY_S) == 1


async def test_what_another_server_puts_off_by_the_longest_waits(
    tmp_path: Path, database_url: str, clock: FakeClock
) -> None:
    """Its clock is as far ahead of ours as it may be."""
    farthest_s = PUT_OFF_S + CLOCKS_APART_S
    assert await is_told_after(tmp_path, database_url, clock, farthest_s) == 0


async def test_control_a_time_that_is_believed_freezes_it(
    tmp_path: Path, database_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_store, "is_due", lambda not_before, now: not_before <= now)
    assert await is_told_after(tmp_path, database_url, clock, DAY_S) == 0


async def test_who_died_before_is_buried_and_who_lives_is_not(
    stores: Stores, clock: FakeClock
) -> None:
    for name in ("dead", "alive"):
        await stores.workers.enlist(name)
    assert await stores.workers.overdue() == []
    clock.advance(-DAY_S)
    await stores.workers.heartbeat("alive")
    assert await stores.workers.overdue() == ["dead"]
    assert not await stores.workers.bury("alive", only_overdue=True)
    assert await stores.workers.bury("dead", only_overdue=True)


@pytest.mark.parametrize("is_steady", [True, pytest.param(False, id="control: by the time of day")])
async def test_a_silent_endpoint_is_asked_again_when_its_time_has_passed(
    tmp_path: Path,
    database_url: str,
    clock: FakeClock,
    is_steady: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steady = FakeClock(50.0) if is_steady else clock

    async def silent(*_: object) -> int:
        raise TimeoutError

    with listening() as ear:
        limits = hooked(tmp_path, ear.url)
        settings = BatchSettings(data_dir=tmp_path, database_url=database_url, owner_limits=limits)
        stores = Stores(settings, clock, steady)
        await stores.prepare()
        await cancelled(stores)
        with monkeypatch.context() as patch:
            patch.setattr(webhooks, "post", silent)
            await stores.webhooks.deliver()
        clock.advance(-DAY_S)
        steady.advance(LONGEST_SILENCE_S)
        await stores.webhooks.deliver()
        await stores.close()
    assert len(ear.heard) == int(is_steady)
