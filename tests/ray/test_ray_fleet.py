"""Replicas under Ray Serve on one PostgreSQL: one is killed, the autoscaler sends one away, chats
go on, and every line of every batch is answered once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import openai
import pytest
import yaml

from tests.batch.batch_postgres import Postgres, binary
from tests.batch.builders import jsonl, submit
from tests.batch.tiny_server import check, until_completed
from tests.batch.word_llama import MAX_MODEL_LEN, make_tiny_llama
from tests.ray.chats import Chats
from tests.ray.cluster import Cluster, Server, until

pytestmark = [pytest.mark.server, pytest.mark.fleet]

CONFIG = Path(__file__).parents[2] / "deploy" / "ray" / "serve.yaml"
NUM_LINES = 2000
MORE_LINES = 500
FEW_LEFT = 300
TARGET_S = 20.0
"""For a first token and between two. The tiny model takes milliseconds: what is generous here is
for a machine of two cores that also starts an engine."""
LOOK_BACK_S = 10.5
"""The least that Serve takes without a warning."""
WORKERS = "SELECT count(*) FROM workers"
HOLD_LINES = """
    SELECT count(DISTINCT lines.owner) FROM lines JOIN batches ON batches.id = lines.batch_id
    WHERE batches.status = 'in_progress'
"""
LOST = "SELECT count(*) FROM lines WHERE losses > 0 AND batch_id = '{}'"


def line(number: int) -> dict[str, Any]:
    """Line `number`: its prompt is its own."""
    prompt = [2 + number % 1000, 2 + number // 1000, *range(2, 2 + number % 60)]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
    body |= {"temperature": 0, "return_token_ids": True}
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}


class Batches:
    """What one client has sent, and goes on sending for as long as something is to be seen."""

    def __init__(self, client: openai.OpenAI) -> None:
        self._client = client
        self.sent: dict[str, list[dict[str, Any]]] = {}

    def send(self, num_lines: int) -> None:
        first = sum(map(len, self.sent.values()))
        lines = [line(number) for number in range(first, first + num_lines)]
        batch_id = submit(self._client, jsonl(lines), endpoint="/v1/completions")
        self.sent[batch_id] = lines

    @property
    def newest(self) -> str:
        return list(self.sent)[-1]

    def keep_going(self) -> None:
        """See to it that lines are left to do."""
        batch = self._client.batches.retrieve(self.newest)
        counts = batch.request_counts
        if batch.status != "validating" and counts and counts.total - counts.completed < FEW_LEFT:
            self.send(MORE_LINES)

    def check(self) -> None:
        for batch_id, lines in self.sent.items():
            until_completed(self._client, batch_id)
            check(self._client, batch_id, lines)


@pytest.fixture
def database() -> Iterator[Postgres]:
    if binary("initdb") is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    postgres = Postgres()
    yield postgres
    postgres.close()


def ask(database: Postgres, query: str) -> int:
    async def fetch() -> Any:
        connection = await asyncpg.connect(database.dsn("postgres"))
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return int(asyncio.run(fetch()))


def config(model: Path, folder: Path, database: Postgres, least: int) -> dict[str, Any]:
    """deploy/ray/serve.yaml with a small model, and `least` replicas at least."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    (one,) = config["applications"]
    one["runtime_env"]["env_vars"] = {
        "CONSERVE_BATCH_DATABASE_URL": database.url("postgres"),
        "CONSERVE_BATCH_FILES_URL": f"file://{folder}/files",
        "CONSERVE_BATCH_LEASE_S": "5",
        "XDG_DATA_HOME": str(folder / "data"),
    }
    flags = {
        "served-model-name": "tiny",
        "max-model-len": MAX_MODEL_LEN,
        "dtype": "float32",
        "enforce-eager": True,
        "max-num-seqs": 32,
        "kv-cache-memory-bytes": 64 << 20,
        "profile-dir": str(folder / "profiles"),
        "additional-config.conserve.profile_seconds": 1,
        "slo-ttft-ms": 1000 * TARGET_S,
        "slo-tbt-ms": 1000 * TARGET_S,
    }
    one["args"] = {"model": str(model), "flags": flags}
    (deployment,) = one["deployments"]
    deployment["autoscaling_config"] |= {
        "min_replicas": least,
        "max_replicas": 3,
        "downscale_delay_s": 1,
        "look_back_period_s": LOOK_BACK_S,
    }
    return config


class Scene:
    """A cluster at work: batches never end while something is waited for."""

    def __init__(self, cluster: Cluster, database: Postgres, batches: Batches) -> None:
        self._cluster, self._database, self._batches = cluster, database, batches
        self.seen: set[Server] = set()

    def until_answering(self, num_servers: int) -> None:
        self._until(
            lambda found: len(found) == num_servers and all(one.answers() for one in found),
            f"{num_servers} servers that answer",
        )

    def until_all_hold_lines(self, num_servers: int) -> None:
        self._until(
            lambda _: ask(self._database, HOLD_LINES) == num_servers,
            f"lines in {num_servers} servers",
        )

    def until_left(self, num_servers: int) -> None:
        self._until(lambda found: len(found) == num_servers, f"end of all but {num_servers}")

    def _until(self, condition: Callable[[list[Server]], bool], what: str) -> None:
        def look() -> bool:
            self._batches.keep_going()
            found = self._cluster.servers()
            self.seen |= set(found)
            return condition(found)

        until(look, what)


def test_nothing_is_lost_or_doubled(tmp_path: Path, database: Postgres) -> None:
    model = make_tiny_llama(tmp_path / "model")
    with Cluster(tmp_path) as cluster:
        cluster.deploy(config(model, tmp_path, database, least=2))
        doomed, _ = cluster.wait_for(2)
        with Chats(cluster.url) as chats, cluster.client as client:
            batches = Batches(client)
            scene = Scene(cluster, database, batches)
            batches.send(NUM_LINES)
            scene.until_all_hold_lines(2)
            killed_s = time.monotonic()
            doomed.kill()
            scene.until_answering(2)
            batches.send(MORE_LINES)  # after the kill, so that nobody else loses a line of it
            scene.until_all_hold_lines(2)
            cluster.deploy(config(model, tmp_path, database, least=1))
            scene.until_left(1)
            # At once, and not when a lease has run out.
            assert ask(database, WORKERS) == 1
            assert ask(database, LOST.format(batches.newest)) == 0
            batches.check()
        # The two, and the one in the place of the killed: offline work has added none.
        assert len(scene.seen) == 3
    within_targets(chats, killed_s)


def within_targets(chats: Chats, killed_s: float) -> None:
    """But for those that ran when a replica was killed."""
    failed = [chat for chat in chats.made if chat.error]
    whole = [chat for chat in chats.made if not chat.error]
    assert [chat for chat in failed if not chat.began_s < killed_s < chat.ended_s] == []
    assert len(whole) > len(failed)
    assert max(chat.worst_wait_s for chat in whole) < TARGET_S
