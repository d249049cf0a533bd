"""The life of batches under any sequence of events, checked against a simple account of it.

Workers come, claim, bring results, are taken for dead and go on as ghosts that do not know it;
batches are cancelled and expire. Whatever happens, each line ends once, with the first result that
was taken for it, and the counts are those of the account.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from conserve.batch.assembly import Assembly
from conserve.batch.ended import Sums
from conserve.batch.errors import InvalidRequestError, LeaseLostError
from conserve.batch.executor import Reply, asgi_executor
from conserve.batch.intake import Intake
from conserve.batch.lease_store import LeaseStore
from conserve.batch.lifecycle import CANCELLABLE, TERMINAL, Status
from conserve.batch.outcome import Outcome, Postponed, keep_reply
from conserve.batch.records import BatchRecord, Line
from conserve.batch.schema import ended, metadata
from conserve.batch.served import Served
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.batch.worker_store import WorkerStore
from tests.batch.batch_fakes import FakeClock, FakeModel
from tests.batch.builders import TENANT, numbered, stored_batch, stored_file

T = TypeVar("T")
WINDOW_S = 60
LEASE_S = 30.0
LIMITS = settings(
    max_examples=20,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Account:
    """What a batch should be, by the simplest reckoning."""

    num_lines: int
    stored: dict[int, tuple[bool, str]] = field(default_factory=dict)


class BatchLife(RuleBasedStateMachine):
    database_url: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        # In memory where the system offers it: most of the time goes to fsync otherwise.
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.folder = tempfile.TemporaryDirectory(prefix="conserve-machine-", dir=memory)
        self.clock = FakeClock()
        self.serial = 0
        self.broken = False
        self.batches: dict[str, Account] = {}
        self.workers: dict[str, list[Line]] = {}
        self.ghosts: dict[str, list[Line]] = {}

    def do(self, work: Awaitable[T]) -> T:
        async def wait() -> T:
            return await work

        try:
            return self.runner.run(wait())
        except (InvalidRequestError, LeaseLostError):
            raise
        except BaseException:
            self.broken = True
            raise

    @initialize()
    def start(self) -> None:
        data_dir = Path(self.folder.name)
        config = BatchSettings(
            data_dir=data_dir, database_url=self.database_url, lease_s=LEASE_S, max_lines=8
        )
        self.stores = Stores(config, self.clock)
        self.do(self.stores.prepare())
        self.do(self.forget_earlier_examples())
        served = Served(asgi_executor(FakeModel().app), self.clock)
        stores = self.stores
        self.intake = Intake(stores.jobs, stores.contents, stores.lengths, served, config)
        self.assembly = Assembly(self.stores.jobs, self.stores.files)
        for _ in range(2):
            self.add_worker()
        self.create_batch(4)
        self.work_on(self.do(self.stores.jobs.claim("worker-1")))

    async def forget_earlier_examples(self) -> None:
        async with self.stores.database.write() as connection:
            for table in reversed(metadata.sorted_tables):
                if table is not ended:
                    await connection.execute(table.delete())
            await connection.execute(ended.update().values(Sums()._asdict()))

    def teardown(self) -> None:
        try:
            if not self.broken:
                self.finish_everything()
        finally:
            self.do(self.stores.close())
            self.runner.close()
            self.folder.cleanup()

    @rule(num_lines=st.integers(0, 9))
    def create_batch(self, num_lines: int) -> None:
        """Files of 1 to 8 lines are good."""
        content = numbered(num_lines) or b"\n"
        self.clock.advance(0.001)
        file = self.do(stored_file(self.stores, content))
        batch = self.do(stored_batch(self.stores, file, completion_window=f"{WINDOW_S}s"))
        self.batches[batch.id] = Account(num_lines)

    @precondition(lambda self: len(self.workers) < 3)
    @rule()
    def add_worker(self) -> None:
        self.serial += 1
        name = f"worker-{self.serial}"
        self.do(self.stores.workers.enlist(name))
        self.workers[name] = []

    @precondition(lambda self: any(self.workers.values()))
    @rule(data=st.data())
    def take_for_dead(self, data: st.DataObject) -> None:
        """A worker stalls longer than its lease; another buries it; it lives on, unknowing."""
        name = data.draw(st.sampled_from(sorted(n for n, held in self.workers.items() if held)))
        self.ghosts[name] = self.workers.pop(name)
        for other in self.workers:
            self.do(self.stores.workers.heartbeat(other))
        self.clock.advance(LEASE_S - 1)
        for other in self.workers:
            self.do(self.stores.workers.heartbeat(other))
        self.clock.advance(2)
        assert name in self.do(self.stores.workers.overdue())
        for other in self.do(self.stores.workers.overdue()):
            assert other in self.ghosts
            self.do(self.stores.workers.bury(other, only_overdue=True))
        if data.draw(st.booleans()):
            self.haunt(name, "good")

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        del self.workers[name]
        self.do(self.stores.workers.retire(name))

    @precondition(lambda self: self.workers and self.batches)
    @rule(data=st.data(), limit=st.integers(1, 4))
    def claim(self, data: st.DataObject, limit: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        batch_id = data.draw(st.sampled_from(list(self.batches)))
        lines = self.do(self.stores.leases.claim(name, batch_id, limit, 1_000_000, 1000))
        for line in lines:
            assert line.line_no not in self.batches[batch_id].stored
            assert all(line not in held for held in self.workers.values())
        self.workers[name] += lines

    @precondition(lambda self: any(self.workers.values()))
    @rule(data=st.data(), how=st.sampled_from(["good", "failed", "later"]))
    def bring(self, data: st.DataObject, how: str) -> None:
        busy = sorted(name for name, held in self.workers.items() if held)
        name = data.draw(st.sampled_from(busy))
        held = self.workers[name]
        count = data.draw(st.integers(1, len(held)))
        brought, self.workers[name] = held[:count], held[count:]
        stored = self.do(self.stores.leases.record(name, self.outcomes(brought, how)))
        assert len(stored) == (0 if how == "later" else count)
        self.note(stored)

    @precondition(lambda self: any(self.ghosts.values()))
    @rule(data=st.data(), how=st.sampled_from(["good", "later"]))
    def a_ghost_brings(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, held in self.ghosts.items() if held)))
        self.haunt(name, how)

    def haunt(self, name: str, how: str) -> None:
        lines = self.ghosts.pop(name)
        assert self.do(self.stores.leases.record(name, self.outcomes(lines, how))) == []
        with pytest.raises(LeaseLostError):
            self.do(self.stores.workers.heartbeat(name))

    def outcomes(self, lines: list[Line], how: str) -> list[Outcome]:
        if how == "later":
            return [Postponed(line, self.clock() + 1, counted=True) for line in lines]
        self.serial += 1
        reply = Reply(200 if how == "good" else 400, json.dumps({"mark": self.serial}).encode())
        return [keep_reply(line, reply) for line in lines]

    def note(self, stored: list[Any]) -> None:
        for result in stored:
            account = self.batches[result.line.batch_id]
            assert result.line.line_no not in account.stored
            account.stored[result.line.line_no] = (result.failed, result.payload.decode())

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def do_a_job(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        self.work_on(self.do(self.stores.jobs.claim(name)))

    def work_on(self, batch: BatchRecord | None) -> bool:
        if batch is None:
            return False
        job = self.intake if batch.is_to_validate else self.assembly
        self.do(job.run(batch))
        return True

    def run_all_lines(self, worker: str) -> None:
        for batch_id in self.batches:
            lines = self.do(self.stores.leases.claim(worker, batch_id, 100, 1_000_000, 1000))
            self.note(self.do(self.stores.leases.record(worker, self.outcomes(lines, "good"))))

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        batch_id = data.draw(st.sampled_from(list(self.batches)))
        status = self.batch(batch_id).status
        if status in CANCELLABLE or status is Status.CANCELLING:
            assert self.do(self.stores.batches.cancel(TENANT, batch_id)).status == "cancelling"
        else:
            with pytest.raises(InvalidRequestError):
                self.do(self.stores.batches.cancel(TENANT, batch_id))

    @rule(seconds=st.sampled_from([1, WINDOW_S]))
    def time_goes_by(self, seconds: int) -> None:
        for _ in range(0, seconds, 20):
            self.clock.advance(min(seconds, 20))
            for name in self.workers:
                self.do(self.stores.workers.heartbeat(name))
        self.do(self.stores.jobs.expire())

    @rule()
    def tidy(self) -> None:
        self.do(self.stores.ended.clear_lines())

    def batch(self, batch_id: str) -> BatchRecord:
        return self.do(self.stores.batches.get(TENANT, batch_id))

    @invariant()
    def counts_are_the_accounts(self) -> None:
        found, _ = self.do(self.stores.batches.page(TENANT, None, 100))
        assert {batch.id for batch in found} == set(self.batches)
        for batch in found:
            account = self.batches[batch.id]
            failed = sum(is_failed for is_failed, _ in account.stored.values())
            assert (batch.failed, batch.completed) == (failed, len(account.stored) - failed)
            if batch.status is Status.COMPLETED:
                assert len(account.stored) == batch.total == account.num_lines

    @invariant()
    def sums_are_those_of_what_ended(self) -> None:
        found, _ = self.do(self.stores.batches.page(TENANT, None, 100))
        for status, sums in self.do(self.stores.ended.sums()).items():
            over = [batch for batch in found if batch.status is status]
            assert sums.num_batches == len(over)
            assert sums.total == sum(batch.total for batch in over)
            assert sums.completed == sum(batch.completed for batch in over)
            assert sums.failed == sum(batch.failed for batch in over)

    def finish_everything(self) -> None:
        """Liveness: time and one worker bring every batch to its end."""
        for name in sorted(self.workers):
            del self.workers[name]
            self.do(self.stores.workers.retire(name))
        self.serial += 1
        self.do(self.stores.workers.enlist("last"))
        self.workers["last"] = []
        self.clock.advance(10)
        while self.work_on(self.do(self.stores.jobs.claim("last"))):
            self.run_all_lines("last")
        self.run_all_lines("last")
        self.clock.advance(WINDOW_S)
        self.do(self.stores.workers.heartbeat("last"))
        self.do(self.stores.jobs.expire())
        while self.work_on(self.do(self.stores.jobs.claim("last"))):
            pass
        for batch_id, account in self.batches.items():
            self.check_files(batch_id, account)

    def check_files(self, batch_id: str, account: Account) -> None:
        batch = self.batch(batch_id)
        assert batch.status in TERMINAL
        lines = {False: self.lines(batch.output_file_id), True: self.lines(batch.error_file_id)}
        for line_no, (failed, payload) in account.stored.items():
            assert lines[failed].pop(f"request-{line_no - 1}") == json.loads(payload)
        assert lines[False] == {}
        assert len(lines[True]) == batch.total - len(account.stored)
        for never_ran in lines[True].values():
            assert never_ran["error"]["code"] == f"batch_{batch.status}"

    def lines(self, file_id: str | None) -> dict[str, Any]:
        if file_id is None:
            return {}

        async def read() -> bytes:
            chunks = self.stores.contents.chunks(file_id)
            return b"".join([chunk async for chunk in chunks])

        found = [json.loads(text) for text in self.do(read()).splitlines()]
        by_id = {each["custom_id"]: each for each in found}
        assert len(by_id) == len(found) > 0
        return by_id


def test_any_life_on_sqlite() -> None:
    run_state_machine_as_test(BatchLife, settings=LIMITS)


def test_any_life_on_postgres(postgres_url: str) -> None:
    class OnPostgres(BatchLife):
        database_url = postgres_url

    run_state_machine_as_test(OnPostgres, settings=settings(LIMITS, max_examples=6))


async def careless_free(connection: Any, worker_id: str, *, lost: bool) -> None:
    """Negative control: the dead keep what they held."""


async def careless_record(
    connection: Any, worker_id: Any, batch_id: str, part: list[Outcome]
) -> Any:
    """Negative control: results are taken from whoever brings them."""
    from conserve.batch import lease_store

    done = [outcome for outcome in part if not isinstance(outcome, Postponed)]
    for outcome in part:
        if isinstance(outcome, Postponed):
            await lease_store._put_back(connection, outcome)
    if done:
        await lease_store._finish(connection, batch_id, done)
    return done


@pytest.mark.parametrize(
    ("store", "name", "careless"),
    [(WorkerStore, "_free", careless_free), (LeaseStore, "_record", careless_record)],
)
def test_carelessness_is_caught(
    store: type, name: str, careless: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, name, staticmethod(careless))
    with pytest.raises(Exception):  # noqa: B017, PT011  (whatever gives it away)
        run_state_machine_as_test(
            BatchLife, settings=settings(LIMITS, phases=[Phase.generate], max_examples=300)
        )
