"""`conserve serve` on the tiny Llama, in a process group of its own that is killed at will."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from conserve.bench.ports import free_port
from tests.batch.batch_server import counts, output_lines
from tests.batch.word_llama import MAX_MODEL_LEN, VOCABULARY

CONSERVE = os.environ.get("CONSERVE_COMMAND", str(Path(sys.executable).with_name("conserve")))
LEAVE_S = 60.0
PATIENCE_S = 900.0


TINY = (
    f"--served-model-name tiny --max-model-len {MAX_MODEL_LEN} --dtype float32 --enforce-eager "
    "--max-num-seqs 32 --kv-cache-memory-bytes 67108864 --disable-uvicorn-access-log"
)


class Served:
    """One life of the server, in a process group of its own. `environment` is added to ours."""

    def __init__(
        self, model: Path, folder: Path, *more: str, environment: Mapping[str, str] | None = None
    ) -> None:
        place = ["--data-dir", str(folder / "data")]
        self._start(["serve", str(model), *place, *more], folder, environment or {})

    @classmethod
    def of(cls, words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Served:
        """Of a whole command line, which may set variables before it names `conserve`."""
        served, at = cls.__new__(cls), words.index("conserve")
        set_before = dict(word.split("=", 1) for word in words[:at])
        folder.mkdir(parents=True)
        place = {"CONSERVE_BATCH_DATA_DIR": str(folder / "data")}
        served._start(words[at + 1 :], folder, {**place, **set_before, **environment})
        return served

    def _start(self, words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.port = free_port()
        more = f"{TINY} --host 127.0.0.1 --port {self.port} --profile-dir {folder / 'profiles'}"
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [CONSERVE, *words, *more.split()],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment},
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
def serving(
    model: Path, folder: Path, *more: str, environment: Mapping[str, str] | None = None
) -> Iterator[Served]:
    served = Served(model, folder, *more, environment=environment)
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


def finish(model: Path, folder: Path, batch_id: str, lines: list[dict[str, Any]]) -> None:
    """One more life, to the end of the batch."""
    with serving(model, folder) as served:
        served.wait()
        with served.client as client:
            until_completed(client, batch_id)
            check(client, batch_id, lines)


def until_completed(client: openai.OpenAI, batch_id: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while client.batches.retrieve(batch_id).status != "completed":
        assert time.monotonic() < deadline
        time.sleep(0.1)
