"""Two workers on one batch in PostgreSQL, interleaved at every statement: whatever the order, what
they leave behind is what one of them alone would leave."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from msgspec.structs import replace
from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from conserve.batch import ended
from conserve.batch.assembly import Assembly
from conserve.batch.batch_store import new_batch
from conserve.batch.ended import EndedStore
from conserve.batch.errors import InvalidRequestError, LeaseLostError, OverLimitError
from conserve.batch.executor import Reply
from conserve.batch.lifecycle import LIVE, TERMINAL, Status
from conserve.batch.outcome import failure, keep_reply
from conserve.batch.records import BatchRecord, Line
from conserve.batch.rules import Rules
from conserve.batch.schema import batches, lines, results
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.validation import Validation
from conserve.batch.wire import BatchCreate
from tests.batch.batch_fakes import FakeClock
from tests.batch.batch_postgres import Postgres
from tests.batch.builders import CHAT, TENANT, batch_body, numbered, stored_batch, stored_file
from tests.batch.interleaving import Interleaving, Player, Work, one_switch, two_switches

pytestmark = pytest.mark.anyio

OK = Reply(200, b'{"usage":{"prompt_tokens":3,"completion_tokens":2}}')
NUM_LINES = 5
MANY, BYTES = 1000, 1_000_000
MAX_LIVE = 3


class Scene:
    """Two workers, `first` and `second`, and the store they share."""

    def __init__(self, game: Interleaving, clock: FakeClock) -> None:
        self.game = game
        self.clock = clock
        self.first, self.second = (player.stores for player in game.players)

    async def enlist(self, *names: str) -> None:
        for name in names:
            await self.first.workers.enlist(name)

    async def retire(self, *names: str) -> None:
        for name in names:
            await self.first.workers.retire(name)

    async def validated(self, **wishes: Any) -> BatchRecord:
        """A batch whose lines are put down, still in the hands of the worker `intake`."""
        self.clock.advance(1)
        content = numbered(NUM_LINES)
        await stored_batch(self.first, await stored_file(self.first, content), **wishes)
        job = await self.first.jobs.claim("intake")
        assert job is not None
        await self.first.jobs.clear_lines(job)
        self.validation = Validation(Rules(CHAT))
        found = [*self.validation.feed(content), *self.validation.finish()]
        await self.first.jobs.add_lines(job, found)
        return job

    async def in_progress(self, **wishes: Any) -> str:
        job = await self.validated(**wishes)
        await self.first.jobs.accept(job, self.validation)
        return job.id

    async def finished(self) -> str:
        """A batch whose lines all have their results."""
        batch_id = await self.in_progress()
        await self.first.leases.record("first", done(await self.claim("first", batch_id)))
        return batch_id

    async def claim(self, worker: str, batch_id: str, limit: int = MANY) -> list[Line]:
        return await self.first.leases.claim(worker, batch_id, limit, BYTES, MANY)

    async def assemble(self, worker: str) -> BatchRecord:
        job = await self.first.jobs.claim(worker)
        assert job is not None
        await Assembly(self.first.jobs, self.first.files).run(job)
        return await self.batch(job.id)

    async def batch(self, batch_id: str) -> BatchRecord:
        return await self.first.batches.get(TENANT, batch_id)

    async def rows(self, table: Any, batch_id: str) -> set[int]:
        query = select(table.c.line_no).where(table.c.batch_id == batch_id)
        async with self.first.database.read() as connection:
            return set((await connection.execute(query)).scalars())

    async def end(self, batch_id: str) -> BatchRecord:
        """Bring the batch to its end with a worker of its own, then forget its lines. Checks that
        each line is in one of the two files, once, and that nothing else is left."""
        await self.enlist("last")
        for name in ("first", "second"):
            await self.first.workers.bury(name, only_overdue=False)
        while (batch := await self.batch(batch_id)).status not in TERMINAL:
            if batch.status is Status.IN_PROGRESS:
                await self.first.leases.record("last", done(await self.claim("last", batch_id)))
            await self.assemble("last")
        await self.retire("last")
        await self.enlist("first", "second")
        while await self.first.ended.clear_lines():
            pass
        await self.check_end(batch)
        return batch

    async def check_end(self, batch: BatchRecord) -> None:
        assert await self.rows(lines, batch.id) == await self.rows(results, batch.id) == set()
        output = await self.lines_of(batch.output_file_id)
        errors = await self.lines_of(batch.error_file_id)
        ids = [each["custom_id"] for each in output + errors]
        if batch.in_progress_at is not None:
            assert sorted(ids) == [f"request-{n}" for n in range(NUM_LINES)]
        codes = [each["error"]["code"] for each in errors]
        assert len(output) == batch.completed
        assert sum(not code.startswith("batch_") for code in codes) == batch.failed

    async def lines_of(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        file = await self.first.files.get(TENANT, file_id)
        content = b"".join([chunk async for chunk in self.first.contents.chunks(file_id)])
        assert len(content) == file.bytes
        return [json.loads(text) for text in content.splitlines()]


def done(held: list[Line]) -> list[Any]:
    return [keep_reply(line, OK) for line in held]


@pytest.fixture
async def scene(
    tmp_path: Path, postgres: Postgres, postgres_url: str, clock: FakeClock
) -> AsyncIterator[Scene]:
    settings = BatchSettings(
        data_dir=tmp_path, database_url=postgres_url, max_live_batches=MAX_LIVE
    )
    name = postgres_url.rpartition("/")[2]
    looker = await asyncpg.connect(postgres.dsn(name))
    # What the stores count on is theirs to ask for: its operator may prefer another.
    await looker.execute(
        f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'"
    )
    players = [Player(Stores(settings, clock)) for _ in range(2)]
    for player in players:
        await player.stores.prepare()
    made = Scene(Interleaving(players, looker), clock)
    await made.enlist("intake", "first", "second")
    yield made
    await looker.close()
    for player in players:
        await player.stores.close()


async def lengths(scene: Scene, works: Sequence[Work]) -> tuple[int, int]:
    """How often each of two works stops when it is let through alone, one after the other."""
    await scene.game.play(works, [])
    first, second = (player.num_stops for player in scene.game.players)
    return first, second


async def uncleared(scene: Scene) -> str:
    """A batch that has ended, with a line and a result each of NUM_LINES."""
    file = await stored_file(scene.first, numbered(1))
    request = BatchCreate(**batch_body(file.id))
    batch = new_batch(TENANT, request, None, 0, None, scene.clock())
    batch = replace(batch, status=Status.COMPLETED, has_lines=True)
    numbers = [{"batch_id": batch.id, "line_no": n} for n in range(1, NUM_LINES + 1)]
    put_down = {"custom_id": "", "offset": 0, "length": 1, "prefix_key": "", "state": "done"}
    put_down |= {"not_before": 0.0, "attempts": 0, "losses": 0}
    async with scene.first.database.write() as connection:
        await connection.execute(batches.insert().values(batch.to_row()))
        await connection.execute(lines.insert(), [{**n, **put_down} for n in numbers])
        result = {"failed": False, "payload": b"{}"}
        await connection.execute(results.insert(), [{**n, **result} for n in numbers])
    return batch.id


async def clear_in_every_order(scene: Scene, orders: Iterable[list[int]]) -> None:
    works = [player.stores.ended.clear_lines for player in scene.game.players]
    for order in orders:
        batch_id = await uncleared(scene)
        found = await scene.game.play(works, order)
        assert set(found) <= {True, False}, found
        # A result whose line is gone would stay for ever.
        assert await scene.rows(results, batch_id) <= await scene.rows(lines, batch_id), order
        while await scene.first.ended.clear_lines():
            pass
        assert await scene.rows(results, batch_id) == await scene.rows(lines, batch_id) == set()


def orders_of_clearing(seed: int = 0) -> list[list[int]]:
    """All with two switches, and some with many."""
    dice = random.Random(seed)
    many = [[dice.randrange(2) for _ in range(16)] for _ in range(20)]
    return [*two_switches(8, 8), *many]


async def test_two_clear_one_batch(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended, "CLEAR_ROWS", 2)
    await uncleared(scene)
    works = [player.stores.ended.clear_lines for player in scene.game.players]
    assert max(await lengths(scene, works)) <= 8
    await clear_in_every_order(scene, orders_of_clearing())


async def careless_clear(connection: AsyncConnection, batch_id: str) -> None:
    """Negative control: each table chooses its own lines."""
    some = select(lines.c.line_no).where(lines.c.batch_id == batch_id).limit(2).scalar_subquery()
    for table in (results, lines):
        gone = await connection.execute(
            delete(table).where(table.c.batch_id == batch_id, table.c.line_no.in_(some))
        )
    if gone.rowcount == 0:
        await connection.execute(
            update(batches).where(batches.c.id == batch_id).values(has_lines=False)
        )


async def careless_clear_lines(self: EndedStore) -> bool:
    """Negative control: the batch is looked for and not locked."""
    finished = batches.c.has_lines.is_(True), batches.c.status.in_(sorted(TERMINAL))
    async with self._database.read() as connection:
        batch_id = (await connection.execute(select(batches.c.id).where(*finished))).scalar()
    if batch_id is None:
        return False
    async with self._database.write() as connection:
        await careless_clear(connection, batch_id)
    return True


async def test_careless_clearing_is_caught(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EndedStore, "clear_lines", careless_clear_lines)
    with pytest.raises(AssertionError):
        await clear_in_every_order(scene, orders_of_clearing())


async def test_two_claim_the_same_lines(scene: Scene) -> None:
    for order in one_switch(6, 6):
        batch_id = await scene.in_progress()
        works: list[Work] = [
            partial(scene.first.leases.claim, "first", batch_id, 3, BYTES, MANY),
            partial(scene.second.leases.claim, "second", batch_id, 3, BYTES, MANY),
        ]
        one, two = await scene.game.play(works, order)
        taken = [line.line_no for line in one + two]
        assert len(taken) == len(set(taken)) >= 3
        await scene.end(batch_id)


async def test_results_come_while_their_worker_is_buried(scene: Scene) -> None:
    for order in one_switch(8, 6):
        batch_id = await scene.in_progress()
        held = await scene.claim("first", batch_id)
        works: list[Work] = [
            partial(scene.first.leases.record, "first", done(held)),
            partial(scene.second.workers.bury, "first", only_overdue=False),
        ]
        stored, was_buried = await scene.game.play(works, order)
        assert was_buried is True
        assert len(stored) in (0, NUM_LINES)
        assert (await scene.batch(batch_id)).completed == len(stored)
        await scene.enlist("first")
        assert (await scene.end(batch_id)).status is Status.COMPLETED


async def test_cancelled_while_it_is_assembled(scene: Scene) -> None:
    assembly = Assembly(scene.first.jobs, scene.first.files)
    for order in one_switch(16, 5):
        batch_id = await scene.finished()
        job = await scene.first.jobs.claim("first")
        assert job is not None
        works: list[Work] = [
            partial(assembly.run, job),
            partial(scene.second.batches.cancel, TENANT, batch_id),
        ]
        assembled, cancelled = await scene.game.play(works, order)
        if isinstance(cancelled, InvalidRequestError):
            assert assembled is None
        else:
            assert isinstance(assembled, LeaseLostError)
        batch = await scene.end(batch_id)
        assert batch.status is (Status.COMPLETED if assembled is None else Status.CANCELLED)
        assert batch.completed == NUM_LINES


async def test_an_old_worker_assembles_beside_the_new(scene: Scene) -> None:
    """The old one began before the late batch was cancelled: its error file says otherwise."""
    for order in list(one_switch(16, 16))[::2]:
        batch_id = await scene.in_progress(completion_window="60s")
        await scene.first.leases.record("first", done(await scene.claim("first", batch_id, 2)))
        scene.clock.advance(60)
        await scene.first.jobs.expire()
        old = await scene.first.jobs.claim("first")
        await scene.first.batches.cancel(TENANT, batch_id)
        new = await scene.second.jobs.claim("second")
        assert old is not None
        assert new is not None
        works: list[Work] = [
            partial(Assembly(scene.first.jobs, scene.first.files).run, old),
            partial(Assembly(scene.second.jobs, scene.second.files).run, new),
        ]
        lost, ended_ = await scene.game.play(works, order)
        assert isinstance(lost, LeaseLostError)
        assert ended_ is None
        batch = await scene.end(batch_id)
        assert batch.status is Status.CANCELLED
        codes = [each["error"]["code"] for each in await scene.lines_of(batch.error_file_id)]
        assert codes == ["batch_cancelled"] * (NUM_LINES - 2)


async def test_time_is_over_while_it_is_validated(scene: Scene) -> None:
    for order in one_switch(4, 6):
        job = await scene.validated(completion_window="60s")
        scene.clock.advance(60)
        works: list[Work] = [
            partial(scene.first.jobs.accept, job, scene.validation),
            scene.second.jobs.expire,
        ]
        accepted, _ = await scene.game.play(works, order)
        assert accepted is None or isinstance(accepted, LeaseLostError)
        await scene.first.jobs.expire()
        batch = await scene.end(job.id)
        assert batch.status is Status.EXPIRED
        assert (batch.in_progress_at is None) == (accepted is not None)


async def test_worn_lines_are_failed_while_time_runs_out(scene: Scene) -> None:
    async def expire_and_assemble() -> None:
        await scene.second.jobs.expire()
        job = await scene.second.jobs.claim("second")
        if job is not None:
            await Assembly(scene.second.jobs, scene.second.files).run(job)

    for order in list(one_switch(8, 22))[::2]:
        batch_id = await scene.in_progress(completion_window="60s")
        held = await scene.claim("first", batch_id, 2)
        await scene.first.workers.bury("first", only_overdue=False)
        await scene.enlist("first")
        scene.clock.advance(60)
        worn = [failure(line, "server_error", "worn") for line in held]
        works: list[Work] = [
            partial(scene.first.leases.record, None, worn),
            expire_and_assemble,
        ]
        await scene.game.play(works, order)
        await scene.first.jobs.expire()
        batch = await scene.end(batch_id)
        assert batch.status is Status.EXPIRED


async def test_two_make_the_last_batch_that_is_allowed(scene: Scene) -> None:
    file = await stored_file(scene.first, numbered(1))
    for _ in range(MAX_LIVE - 1):
        await stored_batch(scene.first, file)
    works = [partial(stored_batch, player.stores, file) for player in scene.game.players]
    for order in one_switch(6, 6):
        found = await scene.game.play(works, order)
        (made,) = (one for one in found if isinstance(one, BatchRecord))
        (refused,) = (one for one in found if isinstance(one, OverLimitError))
        assert str(MAX_LIVE) in refused.message
        live = select(func.count()).where(batches.c.status.in_(sorted(LIVE)))
        async with scene.first.database.read() as connection:
            assert (await connection.execute(live)).scalar_one() == MAX_LIVE
        async with scene.first.database.write() as connection:
            await connection.execute(delete(batches).where(batches.c.id == made.id))


async def delete_in_every_order(scene: Scene) -> None:
    """A file, while a batch of it is made: it goes, or has a batch."""
    first, second = scene.first, scene.second
    for order in one_switch(8, 8):
        file = await stored_file(first, numbered(1))
        works: list[Work] = [
            partial(stored_batch, first, file),
            partial(second.files.delete, TENANT, file.id),
        ]
        made, gone = await scene.game.play(works, order)
        assert isinstance(made, BatchRecord | InvalidRequestError), made
        assert gone is None or isinstance(gone, InvalidRequestError), gone
        assert isinstance(made, BatchRecord) is (gone is not None), order
        async with first.database.write() as connection:
            await connection.execute(delete(batches))


async def test_a_file_goes_while_a_batch_of_it_is_made(scene: Scene) -> None:
    await delete_in_every_order(scene)


async def test_control_a_look_from_before_the_lock_is_caught(scene: Scene) -> None:
    for player in scene.game.players:
        database = player.stores.database
        database._writer = database._engine.execution_options(isolation_level="REPEATABLE READ")
    with pytest.raises(AssertionError):
        await delete_in_every_order(scene)
