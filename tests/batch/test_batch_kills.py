"""`conserve serve` itself under kill -9, whole or in part, at seeded random moments of a batch."""

from __future__ import annotations

import random
import signal
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.batch.builders import jsonl, submit
from tests.batch.tiny_server import PATIENCE_S, Served, done, finish, request, serving
from tests.batch.word_llama import make_tiny_llama

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(7200)]

SEED = 20
NUM_LINES = 5_000
# One process dies alone now and then; what it leaves is ended as a supervisor would end it.
VICTIMS = ["group"] * 12 + ["engine"] * 4 + ["api"] * 4
NUM_KILLS_WHILE_STARTING = 3
MOST_OF_A_START_S = 15.0


@dataclass(frozen=True)
class Kill:
    """Of `victim`, once so many lines are done and `pause_s` have passed; or so long after the
    start of a server that does not answer yet."""

    victim: str
    num_done: int | None
    pause_s: float


def plan_of_kills(seed: int) -> list[Kill]:
    dice = random.Random(seed)
    victims = dice.sample(VICTIMS, len(VICTIMS))
    starting = [
        Kill("group", None, dice.uniform(0.5, MOST_OF_A_START_S))
        for _ in range(NUM_KILLS_WHILE_STARTING)
    ]
    marks = sorted(dice.sample(range(NUM_LINES), len(VICTIMS) - len(starting) - 1))
    # The last mark is reached while the output is written, or just before.
    running = [
        Kill(victim, mark, dice.uniform(0, 0.3))
        for victim, mark in zip(victims, [*marks, NUM_LINES], strict=False)
    ]
    for kill in starting:
        running.insert(dice.randrange(1, len(running)), kill)
    return running


def live_and_die(served: Served, batch_id: str, kill: Kill) -> int | None:
    """Returns how many lines were done at the last look before the kill; None if none was taken."""
    if kill.num_done is None:
        time.sleep(kill.pause_s)
        served.strike("group")
        return None
    served.wait()
    deadline = time.monotonic() + PATIENCE_S
    with served.client as client:
        while (num_done := done(client, batch_id)) < kill.num_done:
            assert time.monotonic() < deadline, f"only {num_done} lines are done"
            time.sleep(0.02)
    time.sleep(kill.pause_s)
    served.strike(kill.victim)
    return num_done


def test_a_batch_outlives_twenty_kills(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    lines = [request(number) for number in range(NUM_LINES)]
    kills = plan_of_kills(SEED)
    assert len(kills) == 20
    with serving(model, tmp_path) as served:
        served.wait()
        with served.client as client:
            batch_id = submit(client, jsonl(lines), endpoint="/v1/completions")
        live_and_die(served, batch_id, kills[0])
    for number, kill in enumerate(kills[1:], 2):
        with serving(model, tmp_path) as served:
            num_done = live_and_die(served, batch_id, kill)
        print(f"kill {number}: {kill.victim} at {num_done} lines", flush=True)  # noqa: T201
    finish(model, tmp_path, batch_id, lines)


def test_sigterm_lets_lines_in_flight_end(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    lines = [request(number) for number in range(400)]
    for line in lines:
        line["body"]["max_tokens"] = 300
    with serving(model, tmp_path, "--shutdown-timeout", "60") as served:
        served.wait()
        with served.client as client:
            batch_id = submit(client, jsonl(lines), endpoint="/v1/completions")
            deadline = time.monotonic() + PATIENCE_S
            while not (before := done(client, batch_id)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(PATIENCE_S) == 0
        assert served.engines() == []
    with closing(sqlite3.connect(tmp_path / "data" / "batches.db")) as database:
        states = dict(database.execute("SELECT state, count(*) FROM lines GROUP BY state"))
        (lost,) = database.execute("SELECT sum(losses + attempts) FROM lines").fetchone()
        (workers,) = database.execute("SELECT count(*) FROM workers").fetchone()
    # What was in flight has its result, what was not waits, and nothing was tried in vain.
    assert set(states) == {"done", "pending"}
    assert states["done"] > before
    assert (lost, workers) == (0, 0)
    finish(model, tmp_path, batch_id, lines)
