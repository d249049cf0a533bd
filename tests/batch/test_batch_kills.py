"""`conserve serve` itself under kill -9, whole or in part, at seeded random moments of a batch."""

from __future__ import annotations

import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.batch.batch_server import counts, output_lines
from tests.batch.builders import jsonl, submit
from tests.batch.word_llama import MAX_MODEL_LEN, VOCABULARY, make_tiny_llama

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(7200)]

SEED = 20
NUM_LINES = 5_000
CONSERVE = os.environ.get("CONSERVE_COMMAND", str(Path(sys.executable).with_name("conserve")))
# One process dies alone now and then; what it leaves is ended as a supervisor would end it.
VICTIMS = ["group"] * 12 + ["engine"] * 4 + ["api"] * 4
NUM_KILLS_WHILE_STARTING = 3
MOST_OF_A_START_S = 15.0
LEAVE_S = 60.0
PATIENCE_S = 900.0


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


class Served:
    """One life of the server, in a process group of its own."""

    def __init__(self, model: Path, folder: Path, *more: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        words = f"--served-model-name tiny --max-model-len {MAX_MODEL_LEN} --dtype float32"
        words += " --enforce-eager --max-num-seqs 32 --kv-cache-memory-bytes 67108864"
        words += f" --host 127.0.0.1 --port {self.port} --data-dir {folder / 'data'}"
        words += f" --profile-dir {folder / 'profiles'} --disable-uvicorn-access-log"
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [CONSERVE, "serve", str(model), *words.split(), *more],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def client(self) -> openai.OpenAI:
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(api_key="any", base_url=url, max_retries=0, timeout=60)

    def wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server ended at its start"
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=5).is_success:
                    return
            time.sleep(0.1)
        pytest.fail("the server did not start")

    def engines(self) -> list[int]:
        """Process ids of the engine: what is in the group and calls itself so."""
        found = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                pid = int(folder.name)
                is_engine = b"EngineCore" in (folder / "cmdline").read_bytes()
                if is_engine and os.getpgid(pid) == self.process.pid:
                    found.append(pid)
        return found

    def strike(self, victim: str) -> None:
        """Kill -9, then see to it that nothing of the group is left."""
        if victim == "engine":
            for pid in self.engines():
                os.kill(pid, signal.SIGKILL)
            self.process.wait(LEAVE_S)  # a server without its engine ends itself
        elif victim == "api":
            self.process.kill()
            self.process.wait()
            deadline = time.monotonic() + LEAVE_S
            while self.engines():  # and an engine without its server
                assert time.monotonic() < deadline
                time.sleep(0.1)
        self.end()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving(model: Path, folder: Path, *more: str) -> Iterator[Served]:
    served = Served(model, folder, *more)
    try:
        yield served
    finally:
        served.end()


def request(number: int) -> dict[str, Any]:
    """Line `number`: its prompt and its lengths are its own."""
    dice = random.Random(number)
    prompt = [number % VOCABULARY, number // VOCABULARY]
    prompt += dice.choices(range(VOCABULARY), k=dice.randint(1, 100))
    body = {"model": "tiny", "prompt": prompt, "max_tokens": dice.randint(1, 24)}
    body |= {"ignore_eos": True, "temperature": 0, "return_token_ids": True}
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def done(client: openai.OpenAI, batch_id: str) -> int:
    batch = client.batches.retrieve(batch_id)
    assert batch.status in ("validating", "in_progress", "finalizing", "completed"), batch
    _, num_completed, num_failed = counts(batch)
    assert num_failed == 0
    return num_completed


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


def check(client: openai.OpenAI, batch_id: str, lines: list[dict[str, Any]]) -> None:
    """Every line once, with the answer to its own prompt, and all sums right."""
    batch = client.batches.retrieve(batch_id)
    assert (batch.status, batch.error_file_id) == ("completed", None)
    usage = batch.usage
    assert usage is not None
    assert counts(batch) == (len(lines), len(lines), 0)
    answers = output_lines(client, batch)
    assert sorted(a["custom_id"] for a in answers) == sorted(line["custom_id"] for line in lines)
    asked = {line["custom_id"]: line["body"] for line in lines}
    for answer in answers:
        body, (choice,) = asked[answer["custom_id"]], answer["response"]["body"]["choices"]
        assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
        assert choice["prompt_token_ids"] == body["prompt"]
        assert len(choice["token_ids"]) == body["max_tokens"]
        assert choice["finish_reason"] == "length"
    assert usage.input_tokens == sum(len(body["prompt"]) for body in asked.values())
    assert usage.output_tokens == sum(body["max_tokens"] for body in asked.values())


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


def finish(model: Path, folder: Path, batch_id: str, lines: list[dict[str, Any]]) -> None:
    """One more life, to the end of the batch."""
    with serving(model, folder) as served:
        served.wait()
        deadline = time.monotonic() + PATIENCE_S
        with served.client as client:
            while client.batches.retrieve(batch_id).status != "completed":
                assert time.monotonic() < deadline
                time.sleep(0.1)
            check(client, batch_id, lines)


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
