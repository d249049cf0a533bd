"""Real servers on one PostgreSQL: of three one is killed, one is sent away, and chats go on; and as
many as memory holds, ten at most, share one queue."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import openai
import psutil
import pytest

from tests.batch.builders import jsonl, submit
from tests.batch.tiny_server import (
    PATIENCE_S,
    Served,
    check,
    request,
    serving,
    until_completed,
)
from tests.batch.word_llama import make_tiny_llama

pytestmark = [pytest.mark.server, pytest.mark.fleet]

NUM_LINES = 600
LEASE_S = 3.0
SERVER_BYTES = 2.4e9
"""Of memory, with its engine and its worker."""
MOST_SERVERS = 10
HOLDS = """
    SELECT count(*) FROM lines JOIN batches ON batches.id = lines.batch_id
    WHERE lines.owner = $1 AND batches.status = 'in_progress'
"""
LEFT = "SELECT (SELECT count(*) FROM workers), (SELECT count(*) FROM lines)"


@dataclass
class Fleet:
    """Servers with folders of their own, as on machines of their own: of each other they know what
    the database says."""

    model: Path
    folder: Path
    database_url: str
    lives: ExitStack = field(default_factory=ExitStack)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "CONSERVE_BATCH_DATABASE_URL": self.database_url,
            "CONSERVE_BATCH_FILES_URL": f"file://{self.folder}/files",
            "CONSERVE_BATCH_LEASE_S": str(LEASE_S),
        }

    def start(self, name: str) -> Served:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        life = serving(self.model, folder, "--shutdown-timeout", "30", environment=self.environment)
        return self.lives.enter_context(life)

    def worker_of(self, name: str) -> str:
        """What the database calls a living server."""
        (worker,) = (self.folder / name / "data" / "workers").iterdir()
        return worker.name

    def ask(self, query: str, *values: str) -> tuple[int, ...]:
        async def fetch() -> tuple[int, ...]:
            dsn = self.database_url.replace("+asyncpg", "")
            connection = await asyncpg.connect(dsn)
            try:
                return tuple(await connection.fetchrow(query, *values))
            finally:
                await connection.close()

        return asyncio.run(fetch())


@dataclass
class Batches:
    """What one client has sent."""

    client: openai.OpenAI
    sent: list[str] = field(default_factory=list)

    def send(self) -> None:
        self.sent.append(submit(self.client, LINES, endpoint="/v1/completions"))

    def keep_going_until(self, fleet: Fleet, name: str) -> None:
        """Until the server holds lines of a batch that is not over, however fast all are."""
        deadline = time.monotonic() + PATIENCE_S
        worker = fleet.worker_of(name)
        while fleet.ask(HOLDS, worker) == (0,):
            assert time.monotonic() < deadline, f"{name} takes no lines"
            if self.client.batches.retrieve(self.sent[-1]).status == "completed":
                self.send()
            time.sleep(0.02)


@contextmanager
def chatting(served: Served) -> Iterator[list[str]]:
    """Chats one after the other meanwhile; yields their answers. A failure is raised at the end."""
    answers, failures, over = list[str](), list[Exception](), threading.Event()

    def chat() -> None:
        with served.client as client:
            while not over.is_set():
                try:
                    reply = client.completions.create(model="tiny", prompt="w3 w4", max_tokens=4)
                    answers.append(reply.choices[0].text)
                except Exception as error:
                    failures.append(error)
                    return

    thread = threading.Thread(target=chat)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()
    assert not failures


REQUESTS = [request(number) for number in range(NUM_LINES)]
LINES = jsonl(REQUESTS)


def test_a_fleet_outlives_a_kill_and_a_departure(tmp_path: Path, postgres_url: str) -> None:
    fleet = Fleet(make_tiny_llama(tmp_path / "model"), tmp_path, postgres_url)
    with fleet.lives:
        one, two, three = (fleet.start(name) for name in ("one", "two", "three"))
        for served in (one, two, three):
            served.wait()
        with one.client as client, chatting(one) as answers:
            batches = Batches(client)
            batches.send()
            batches.keep_going_until(fleet, "two")
            two.strike("group")
            batches.keep_going_until(fleet, "three")
            three.process.send_signal(signal.SIGTERM)
            assert three.process.wait(PATIENCE_S) == 0
            for batch_id in batches.sent:
                until_completed(client, batch_id)
                check(client, batch_id, REQUESTS)
        assert len(answers) > 0
        eventually_clear(fleet)


def eventually_clear(fleet: Fleet) -> None:
    """The dead server's row is gone, and no batch that has ended keeps lines."""
    deadline = time.monotonic() + PATIENCE_S
    while fleet.ask(LEFT) != (1, 0):
        assert time.monotonic() < deadline, fleet.ask(LEFT)
        time.sleep(0.1)


def test_all_servers_that_memory_holds_share_the_lines(tmp_path: Path, postgres_url: str) -> None:
    fleet = Fleet(make_tiny_llama(tmp_path / "model"), tmp_path, postgres_url)
    fitting = int(psutil.virtual_memory().available / SERVER_BYTES)
    names = [f"server-{number}" for number in range(max(2, min(MOST_SERVERS, fitting)))]
    with fleet.lives:
        servers = [fleet.start(name) for name in names]
        for served in servers:
            served.wait()
        with servers[0].client as client, chatting(servers[-1]):
            batches = Batches(client)
            batches.send()
            for name in names:
                batches.keep_going_until(fleet, name)
            for batch_id in batches.sent:
                until_completed(client, batch_id)
                check(client, batch_id, REQUESTS)
