"""What an owner may have, and its share: the file, the refusals, and turns over a real store."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest

from conserve.batch.deadlines import RecentHarvest
from conserve.batch.errors import OverLimitError, StoreUnavailableError
from conserve.batch.executor import Reply
from conserve.batch.ids import tenant_of
from conserve.batch.outcome import keep_reply
from conserve.batch.outlook import Outlook
from conserve.batch.owner_limits import Limits
from conserve.batch.records import FileRecord, Line
from conserve.batch.settings import BatchSettings
from conserve.batch.share_store import ShareStore
from conserve.batch.stores import Stores
from conserve.batch.turns import Turns
from conserve.server.errors import BadInputError
from conserve.server.start.batch_data import OWNER_LIMITS, settle_data_dir
from tests.batch.batch_fakes import FakeClock, FakeModel, eventually, running
from tests.batch.builders import batch_body, numbered, stored_file
from tests.batch.test_batch_contract import BYTES, MANY, batch_in_progress
from tests.batch.test_batch_shares import view

pytestmark = pytest.mark.anyio

MINE, THEIRS = tenant_of("Bearer mine"), tenant_of("Bearer theirs")
# As many as are expected of a line that names no maximum.
ANSWER = Reply(200, b'{"usage":{"prompt_tokens":10,"completion_tokens":256}}')
LINE_TOKENS = 266


def limits_file(folder: Path, told: object) -> Path:
    path = folder / "limits.json"
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    return path


def test_what_an_entry_leaves_out_is_as_default_has_it(tmp_path: Path) -> None:
    told = {
        "default": {"share": 2, "max_queued_tokens": 5},
        MINE: {"max_queued_tokens": None, "max_stored_bytes": 7},
        "everybody": {"max_live_batches": 1},
    }
    limits = Limits(limits_file(tmp_path, told), 1000)
    mine, anybody = limits.of(MINE), limits.of(THEIRS)
    assert (mine.share, mine.max_queued_tokens, mine.max_stored_bytes) == (2, None, 7)
    assert (anybody.share, anybody.max_queued_tokens, anybody.max_live_batches) == (2, 5, 1000)
    assert limits.of("everybody").max_live_batches == 1
    assert Limits(None, 10).of(MINE).max_live_batches == 10


def test_a_file_of_windows_is_read(tmp_path: Path) -> None:
    path = limits_file(tmp_path, '\ufeff{"default": {"share": 2}}\r\n')
    assert Limits(path, 1000).of(MINE).share == 2


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("{", "it is no JSON"),
        ([], "must be an object of owners"),
        ({"sk-secret": {}}, "'sk-secret' is no owner; name 'default', 'everybody' or the SHA-256"),
        ({"default": 3}, "default: it must be an object of limits, not int"),
        ({"default": {"share": 0}}, "default: share: .*greater than or equal to 0.001"),
        ({"default": {"max_tokens": 1}}, "default: max_tokens: must be one of share, max_live"),
        ({MINE: {"max_stored_bytes": -1}}, f"{MINE}: max_stored_bytes: "),
        ({MINE: {"max_stored_bytes": "10GiB"}}, f"{MINE}: max_stored_bytes: .*valid integer"),
    ],
)
def test_a_file_that_is_wrong_is_refused_at_start(
    tmp_path: Path, told: object, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = limits_file(tmp_path, told)
    monkeypatch.setenv(OWNER_LIMITS, str(path))
    with pytest.raises(BadInputError, match=f"^--owner-limits cannot be used: {path}: .*{says}"):
        settle_data_dir(str(tmp_path / "data"), "m")


def test_a_file_that_is_missing_is_refused_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OWNER_LIMITS, str(tmp_path / "none.json"))
    with pytest.raises(BadInputError, match=r"--owner-limits cannot be used: .*none\.json"):
        settle_data_dir(str(tmp_path / "data"), "m")


def test_a_change_of_the_file_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = limits_file(tmp_path, {"default": {"share": 2}})
    limits = Limits(path, 1000)
    for number, (told, share) in enumerate(
        [({"default": {"share": 3}}, 3), ("{", 3), ({}, 1), ({"default": {"share": 5}}, 5)]
    ):
        limits_file(tmp_path, told)
        os.utime(path, ns=(number, number))
        for _ in range(3):
            assert limits.share_of(MINE) == share
    path.unlink()
    for _ in range(3):
        assert limits.share_of(MINE) == 5
    # Of the wrong file, and of none: once each.
    assert caplog.text.count("the limits of owners stay as they were") == 2
    limits_file(tmp_path, {"default": {"share": 7}})
    assert limits.share_of(MINE) == 7


async def test_a_look_asks_for_each_share_once(stores: Stores) -> None:
    """They come from a file, and a look at many batches needs them again and again."""
    asked = list[str]()

    def share_of(tenant: str) -> float:
        asked.append(tenant)
        return 1.0

    standing = await ShareStore(stores.database, share_of).standing()
    views = [view(tenant, f"{tenant}-{n}") for tenant in "ab" for n in range(10)]
    Outlook.over(views, 0.0, RecentHarvest(100.0, 10.0), standing)
    assert sorted(asked) == ["a", "b"]


async def refused(call: Any, limit: str, words: str) -> None:
    with pytest.raises(openai.RateLimitError, match=words) as caught:
        await call
    assert limit in caught.value.message
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "rate_limit_error")
    assert int(caught.value.response.headers["retry-after"]) > 0


async def test_requests_tokens_and_bytes_of_a_key_are_bounded(tmp_path: Path) -> None:
    content = numbered(4)
    told = {
        MINE: {"max_queued_requests": 6, "max_stored_bytes": 5 * len(content)},
        THEIRS: {"max_queued_tokens": 2000},
    }
    settings = BatchSettings(
        data_dir=tmp_path / "data", poll_s=0.05, owner_limits=limits_file(tmp_path, told)
    )
    model = FakeModel(api_keys=["mine", "theirs"])
    model.open.clear()
    async with running(settings, model) as run:
        batches, file_id = run.client.batches, await run.upload(content)
        first = await batches.create(**batch_body(file_id))
        refusal = "4 requests of this key are queued, and 4 more would be over the limit of 6"
        await refused(batches.create(**batch_body(file_id)), "max_queued_requests", refusal)
        long = await run.upload(numbered(7))
        with pytest.raises(openai.BadRequestError, match=r"7 requests.* 6 in all.*split the file"):
            await batches.create(**batch_body(long))
        await refused(run.upload(numbered(12)), "max_stored_bytes", "bytes of this key are stored")
        with pytest.raises(openai.BadRequestError, match=r"^Error code: 400.*file: .* bytes, and"):
            await run.upload(numbered(40))
        other = run.client_of("theirs")
        theirs = await run.upload(content, other)
        one = await other.batches.create(**batch_body(theirs))
        assert one.request_counts is not None
        await refused(
            other.batches.create(**batch_body(theirs)), "max_queued_tokens", "tokens of this key"
        )
        model.open.set()
        await run.until(first.id, "completed")
        await batches.create(**batch_body(file_id))  # what has ended counts no more


async def test_bytes_are_bounded_however_many_come_at_once(
    tmp_path: Path, database_url: str, clock: FakeClock
) -> None:
    content = numbered(4)
    path = limits_file(tmp_path, {"default": {"max_stored_bytes": 3 * len(content)}})
    settings = BatchSettings(data_dir=tmp_path, database_url=database_url, owner_limits=path)
    stores = Stores(settings, clock)
    await stores.prepare()
    for round_ in range(2):
        found = await asyncio.gather(
            *(stored_file(stores, content, MINE) for _ in range(5)), return_exceptions=True
        )
        kept = [one for one in found if isinstance(one, FileRecord)]
        assert all(isinstance(one, FileRecord | OverLimitError) for one in found)
        assert len(kept) == (3 if round_ == 0 else 1)
        if round_ == 0:
            await stores.files.delete(MINE, kept[0].id)
    await stores.close()


async def test_what_could_not_be_stored_does_not_count(
    tmp_path: Path, database_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the storage is away its owner tries again and again, and once more when it is back."""
    content = numbered(4)
    path = limits_file(tmp_path, {"default": {"max_stored_bytes": 2 * len(content)}})
    settings = BatchSettings(data_dir=tmp_path, database_url=database_url, owner_limits=path)
    stores = Stores(settings, clock)
    await stores.prepare()

    async def away(*_: object) -> None:
        raise StoreUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(stores.contents, "keep", away)
        for _ in range(3):
            with pytest.raises(StoreUnavailableError):
                await stored_file(stores, content, MINE)
    assert (await stored_file(stores, content, MINE)).bytes == len(content)
    await stores.close()


class Fleet:
    """Workers on one store, each with its own look at it and its own turns."""

    def __init__(self, workers: list[Stores], clock: FakeClock) -> None:
        self._workers = workers
        self._clock = clock
        self._turns = [Turns() for _ in workers]
        self.held: list[list[Line]] = [[] for _ in workers]

    async def enlist(self) -> None:
        for number, stores in enumerate(self._workers):
            await stores.workers.enlist(f"w{number}")

    async def feed(self, number: int, window: int) -> None:
        """Take lines until `window` are held."""
        stores, turns = self._workers[number], self._turns[number]
        stores.lookout.forget()
        outlook = await stores.lookout.outlook(self._clock())
        waiting = await stores.leases.waiting(MANY)
        free = window - len(self.held[number])
        for prospect, limit in turns.share_out(outlook, waiting, free):
            name = prospect.view.batch_id
            self.held[number] += await stores.leases.claim(f"w{number}", name, limit, BYTES, MANY)
            floor = outlook.floors.get(prospect.view.tenant)
            if floor is not None:
                await stores.shares.lift(prospect.view.tenant, floor)

    async def finish(self, number: int, count: int) -> None:
        done, self.held[number] = self.held[number][:count], self.held[number][count:]
        results = [keep_reply(line, ANSWER) for line in done]
        stored = await self._workers[number].leases.record(f"w{number}", results)
        assert len(stored) == len(done)


async def test_workers_of_one_store_share_out_together(
    tmp_path: Path, database_url: str, clock: FakeClock
) -> None:
    """Three times as much for one of two keys, whichever worker asks, and one result each."""
    path = limits_file(tmp_path, {MINE: {"share": 3}})
    workers = [
        Stores(
            BatchSettings(data_dir=tmp_path / str(n), database_url=database_url, owner_limits=path),
            clock,
        )
        for n in range(2)
    ]
    for stores in workers:
        await stores.prepare()
    ids = {
        tenant: await batch_in_progress(workers[0], 200, tenant=tenant) for tenant in (MINE, THEIRS)
    }
    fleet = Fleet(workers, clock)
    await fleet.enlist()
    for turn in range(24):
        await fleet.feed(turn % 2, window=8)
        await fleet.finish(turn % 2, 5)
    done = {tenant: (await workers[1].batches.get(tenant, ids[tenant])).completed for tenant in ids}
    assert sum(done.values()) == 24 * 5
    assert abs(done[MINE] - 3 * done[THEIRS]) <= 3 * 8
    served = (await workers[0].shares.standing()).served
    assert served[THEIRS] == pytest.approx(done[THEIRS] * LINE_TOKENS)
    assert served[MINE] == pytest.approx(done[MINE] * LINE_TOKENS / 3)
    for stores in workers:
        await stores.close()


async def test_a_second_key_gets_half_of_a_busy_server(tmp_path: Path) -> None:
    settings = BatchSettings(data_dir=tmp_path, poll_s=0.05, max_in_flight=8)
    model = FakeModel(api_keys=["mine", "theirs"])
    model.open.clear()
    async with running(settings, model) as run:
        await run.submit(numbered(300), priority=1)
        await eventually(lambda: model.running == 8)
        other = run.client_of("theirs")
        content = numbered(300).replace(b"prompt", b"theirs")
        theirs = await other.batches.create(**batch_body(await run.upload(content, other)))
        run.client = other
        await run.until(theirs.id, "in_progress")
        model.open.set()
        await eventually(lambda: len(model.bodies) >= 200)
    asked = [body["messages"][-1]["content"].split()[0] for body in model.bodies[:200]]
    counts = Counter(asked)
    assert counts["theirs"] >= 80
    assert counts["prompt"] >= 80
