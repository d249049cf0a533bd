"""Half an hour of full load, faults and operators; nothing is lost, doubled or stuck, memory flat.

    CONSERVE_SOAK_SECONDS=120 python -m pytest -m long tests/soak -s    # shorter

In the first half nothing ends the server, so that a leak shows; in the second it is killed too.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from conserve.bench.ports import free_port
from tests.batch.batch_postgres import Postgres, binary
from tests.soak.clients import MODEL, TERMINAL, Answers, Client
from tests.soak.faults import Faults
from tests.soak.memory import Memory
from tests.soak.server import Supervised
from tests.stops.tiny_llama import make_model

DURATION_S = float(os.environ.get("CONSERVE_SOAK_SECONDS", "1800"))
pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(DURATION_S + 2400)]

KINDS = {"chat": (3, 0.4), "harvest": (2, 0.1), "batch": (3, 1.0)}
"""What a client does -> how many do, and the longest pause between two."""
EAGER = {"stop": "eager", "profile_seconds": 1, "stop_response_s": 1e-6, "checkpoint_verify": True}
PAUSE_S = 8.0


def flags(model: Path, folder: Path, port: int) -> list[str]:
    """Scarce: 2,700 tokens of KV for up to 16 requests of up to 940, and copies of half as many on
    the host, the rest on disk."""
    return [
        *(str(model), "--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"),
        *("--block-size", "32", "--max-num-batched-tokens", "256", "--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", "16M", "--checkpoint-bytes", "8M"),
        *("--checkpoint-dir", str(folder / "kv"), "--checkpoint-dir-bytes", "64M"),
        *("--profile-dir", str(folder / "profiles"), "--data-dir", str(folder / "data")),
        *("--shutdown-timeout", "5", "--host", "127.0.0.1", "--port", str(port)),
        *("--additional-config", json.dumps({"conserve": EAGER})),
        *("--disable-access-log-for-endpoints", "/metrics,/health"),
    ]


@pytest.fixture(params=["sqlite", "postgresql"] if os.environ.get("CONSERVE_SOAK_BOTH") else [None])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """PostgreSQL where there is one; SQLite otherwise, or as well."""
    kind = request.param or ("postgresql" if binary("initdb") else "sqlite")
    if kind == "sqlite":
        yield tmp_path / "data" / "batches.db"
        return
    postgres = Postgres("fsync=off")
    yield postgres
    postgres.close()


@pytest.fixture
def server(database: Any, tmp_path: Path) -> Iterator[Supervised]:
    port = free_port()
    environment = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if isinstance(database, Postgres):
        environment["CONSERVE_BATCH_DATABASE_URL"] = database.url("postgres")
    model = make_model(tmp_path / "model")
    conserve = str(Path(sys.executable).with_name("conserve"))
    command = [conserve, "serve", *flags(model, tmp_path, port)]
    server = Supervised(command, environment, f"http://127.0.0.1:{port}", tmp_path / "log")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()


def work(server: Supervised, faults: Faults, answers: Answers) -> tuple[Counter[str], Memory]:
    over = threading.Event()
    memory = Memory(server)
    half_s = time.monotonic() + DURATION_S / 2
    num_clients = sum(number for number, _ in KINDS.values())
    with ThreadPoolExecutor(num_clients) as pool:
        futures: list[Future[Counter[str]]] = []
        for kind, (number, pause_s) in KINDS.items():
            for _ in range(number):
                client = Client(server.url, answers, len(futures), over)
                futures.append(pool.submit(client.repeat, getattr(client, kind), pause_s))
        try:
            faults.run(half_s, PAUSE_S, deadly=False)
            memory.close()
            faults.run(half_s + DURATION_S / 2, PAUSE_S, deadly=True)
        finally:
            server.wait_until_ready()
            for path in ("/resume", "/wake_up"):
                httpx.post(f"{server.url}{path}", timeout=60)
            over.set()
        return sum((future.result() for future in futures), Counter()), memory


def metric(server: Supervised, name: str) -> float:
    """Summed over labels."""
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    found = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    assert found, name
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def assert_nothing_is_left(server: Supervised) -> None:
    listed = httpx.get(f"{server.url}/v1/batches", params={"limit": 100}, timeout=60).json()["data"]
    live = [batch["id"] for batch in listed if batch["status"] not in TERMINAL]
    deadline = time.monotonic() + 300
    while live or metric(server, "conserve:running_requests"):
        assert time.monotonic() < deadline, f"{live} never end"
        states = {name: httpx.get(f"{server.url}/v1/batches/{name}").json() for name in live}
        live = [name for name, batch in states.items() if batch["status"] not in TERMINAL]
        time.sleep(0.5)
    assert metric(server, "conserve:kv_blocks") == 0, "blocks were lost"


def test_nothing_is_lost_doubled_or_stuck(
    server: Supervised, database: Any, tmp_path: Path
) -> None:
    answers = Answers(seed=1)
    faults = Faults(server, tmp_path / "kv", database, seed=2)
    counts, memory = work(server, faults, answers)
    assert_nothing_is_left(server)
    print(f"\nsoak of {DURATION_S:g} s on {type(database).__name__}")  # noqa: T201
    for name, figures in (
        ("clients", dict(sorted(counts.items()))),
        ("faults", dict(sorted(faults.counts.items()))),
        ("starts", server.num_starts),
        ("answers that differ", sorted(set(answers.differing))),
        ("MiB early and late", memory.growth()),
    ):
        print(f"{name}: {figures}")  # noqa: T201
    assert not answers.differing
    assert not memory.leaking()
    assert min(counts[f"{kind} answered"] for kind in ("default", "flex")) > DURATION_S / 60
    assert counts["batches"] >= 3
