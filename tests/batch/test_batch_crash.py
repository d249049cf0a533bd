"""Servers that are really killed: no line lost, none twice, every answer right, every count too."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.batch.batch_fakes import answer
from tests.batch.batch_server import PATIENCE_S, Server, counts, output_lines, server
from tests.batch.builders import jsonl, line, numbered, submit

# Every run with work left passes each point this often.
EARLY_POINTS = {"model": 40, "before-commit": 12, "after-commit": 12}
# Passed when the output file is put in its place.
LATE_POINTS = ["before-keep:1", "after-keep:1"]


def status_of(one: Server, batch_id: str) -> str:
    """Its status, or `dead`."""
    try:
        with one.client as client:
            return client.batches.retrieve(batch_id).status
    except (openai.APIConnectionError, httpx.TransportError):
        return "dead"


def run_to_the_end(one: Server, batch_id: str) -> str:
    """`completed`, or `dead` when the server died first."""
    patience = time.monotonic() + PATIENCE_S
    while one.process.poll() is None:
        status = status_of(one, batch_id)
        if status not in ("validating", "in_progress", "finalizing", "dead"):
            return status
        assert time.monotonic() < patience
        time.sleep(0.05)
    return "dead"


def check_complete(one: Server, batch_id: str, prompts: dict[str, str], folder: Path) -> None:
    with one.client as client:
        batch = client.batches.retrieve(batch_id)
        assert batch.status == "completed"
        assert counts(batch) == (len(prompts), len(prompts), 0)
        assert batch.usage is not None
        assert batch.usage.input_tokens == 3 * len(prompts)
        assert batch.usage.output_tokens == 2 * len(prompts)
        assert batch.error_file_id is None
        lines = output_lines(client, batch)
        found = [(each["custom_id"], each["response"]["body"]) for each in lines]
        assert sorted(custom_id for custom_id, _ in found) == sorted(prompts)
        assert all(body == answer(prompts[custom_id]) for custom_id, body in found)
        files = {file.id for file in client.files.list()}
        assert {path.name for path in (folder / "files").iterdir()} == files


def early_points(seed: int, count: int) -> list[str]:
    dice = random.Random(seed)
    points = [dice.choice(sorted(EARLY_POINTS)) for _ in range(count)]
    return [f"{point}:{dice.randint(1, EARLY_POINTS[point])}" for point in points]


def crash_and_recover(folder: Path, points: list[str], num_lines: int, **settings: Any) -> None:
    """Submit and kill, then kill at each point in turn, then let the batch end."""
    prompts = {f"request-{n}": f"prompt {n}" for n in range(num_lines)}
    with server(folder, **settings) as one:
        assert one.wait()
        with one.client as client:
            batch_id = submit(client, numbered(num_lines))
    for point in points:
        with server(folder, point, **settings) as one:
            assert not one.wait() or run_to_the_end(one, batch_id) == "dead", point
    with server(folder, **settings) as one:
        assert one.wait()
        assert run_to_the_end(one, batch_id) == "completed"
        check_complete(one, batch_id, prompts, folder)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_seeded_points_on_sqlite(tmp_path: Path, seed: int) -> None:
    crash_and_recover(tmp_path, early_points(seed, 4) + LATE_POINTS, num_lines=700)


def test_killed_at_seeded_points_on_postgres(tmp_path: Path, postgres_url: str) -> None:
    points = early_points(3, 4) + LATE_POINTS
    crash_and_recover(tmp_path, points, num_lines=700, database_url=postgres_url)


@pytest.mark.long
@pytest.mark.parametrize("seed", [4, 5])
def test_five_thousand_lines_and_twenty_kills(tmp_path: Path, seed: int) -> None:
    crash_and_recover(tmp_path, early_points(seed, 17) + LATE_POINTS, num_lines=5_000)


def test_two_servers_share_one_batch_and_one_outlives_the_other(
    tmp_path: Path, postgres_url: str
) -> None:
    shared: dict[str, Any] = {
        "database_url": postgres_url,
        "files_url": f"file://{tmp_path}/files",
        "lease_s": 2.0,
        "max_in_flight": 8,
    }
    prompts = {f"request-{n}": f"prompt {n}" for n in range(400)}
    # Folders of their own: as on two machines, only the lease tells that the other is dead.
    with (
        server(tmp_path / "one", data_dir=tmp_path / "one", **shared) as one,
        server(tmp_path / "two", "model:50", data_dir=tmp_path / "two", **shared) as two,
    ):
        assert one.wait()
        assert two.wait()
        batch_ids = []
        while two.process.poll() is None:  # until it has had its part, however fast the other is
            with one.client as client:
                batch_ids.append(submit(client, numbered(400)))
            assert run_to_the_end(one, batch_ids[-1]) == "completed"
        assert two.process.returncode == -signal.SIGKILL
        for batch_id in batch_ids:
            check_complete(one, batch_id, prompts, tmp_path)


def test_sigterm_gives_leases_back(tmp_path: Path) -> None:
    content = numbered(50) + jsonl([line("slow", "fail:503:1000000:x")])
    with server(tmp_path, lease_s=3600) as one:
        assert one.wait()
        patience = time.monotonic() + PATIENCE_S
        with one.client as client:
            batch_id = submit(client, content)
            while counts(client.batches.retrieve(batch_id))[1] < 50:
                assert time.monotonic() < patience
                time.sleep(0.05)
        one.kill(signal.SIGTERM)
        assert one.process.returncode == 0
    assert list((tmp_path / "workers").iterdir()) == []
