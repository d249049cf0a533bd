"""Containers for the tests of the image, by Docker or Podman, held as strictly as the chart's."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import openai

from conserve.bench.ports import free_port
from tests.conftest import START_LIMIT_S
from tests.waiting import eventually

KEY = "a-key"
MODEL = "SmolLM2-135M-Instruct"
BODY: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Name three colours."}],
    "max_tokens": 8,
}
# Of a batch that is not done in the moment in which its server is told to stop.
LINES = 200
# What docker stop waits for; above the server's own --shutdown-timeout.
SHUTDOWN_S, GRACE_S = 60, 120
# /tmp is the only other folder that may be written, as in the chart; Docker makes it noexec.
CONFINED = [
    "--read-only",
    "--tmpfs=/tmp:noexec",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
]


@dataclass(frozen=True)
class Engine:
    """`docker` or `podman`."""

    program: str

    def run(self, *words: str) -> str:
        """What it prints. Fails with what it says."""
        done = subprocess.run([self.program, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def inspect(self, name: str) -> dict[str, Any]:
        (found,) = json.loads(self.run("inspect", name))
        return dict(found)

    def has(self, image: str) -> bool:
        """Here, or on a hub that is reached."""
        return any(
            subprocess.run(
                [self.program, *words, image], capture_output=True, check=False
            ).returncode
            == 0
            for words in (["image", "inspect"], ["pull"])
        )

    def confined(self) -> list[str]:
        # Podman's --read-only alone would let more be written.
        return [*CONFINED, *(["--read-only-tmpfs=false"] if self.program == "podman" else [])]

    @contextmanager
    def volumes(self, *names: str) -> Iterator[dict[str, str]]:
        """New ones by name, removed at the end."""
        made = {name: f"conserve-test-{name}-{uuid4().hex}" for name in names}
        for volume in made.values():
            self.run("volume", "create", volume)
        try:
            yield made
        finally:
            for volume in made.values():
                self.run("volume", "rm", "--force", volume)


@dataclass(frozen=True)
class Container:
    """A server in one."""

    engine: Engine
    name: str
    url: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=300)

    def await_health(self) -> None:
        deadline_s = time.monotonic() + START_LIMIT_S
        while not self.answers():
            assert self.runs(), self.log()
            assert time.monotonic() < deadline_s, self.log()
            time.sleep(0.5)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").is_success
        except httpx.TransportError:
            return False

    def runs(self) -> bool:
        return bool(self.engine.inspect(self.name)["State"]["Running"])

    def log(self) -> str:
        done = subprocess.run(
            [self.engine.program, "logs", self.name], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    def shell(self, command: str) -> str:
        return self.engine.run("exec", self.name, "sh", "-c", command)

    def stop(self) -> subprocess.Popen[bytes]:
        """Begins to; SIGKILL comes after `GRACE_S`."""
        return subprocess.Popen([self.engine.program, "stop", "--time", str(GRACE_S), self.name])


@contextmanager
def serving(engine: Engine, image: str, volumes: dict[str, str]) -> Iterator[Container]:
    """A container that serves the default model, its port published for this machine only."""
    name, port = f"conserve-test-{uuid4().hex}", free_port()
    words = ["run", "--detach", f"--name={name}", *engine.confined(), "--shm-size=1g"]
    words += [f"--volume={volume}:/{folder}" for folder, volume in volumes.items()]
    words += [f"--publish=127.0.0.1:{port}:8000", f"--env=VLLM_API_KEY={KEY}"]
    engine.run(*words, image, f"--shutdown-timeout={SHUTDOWN_S}")
    found = Container(engine, name, f"http://127.0.0.1:{port}")
    try:
        found.await_health()
        yield found
    finally:
        engine.run("rm", "--force", name)


def submit(client: openai.OpenAI, lines: int) -> str:
    """The batch's id."""
    work = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": BODY}
        for i in range(lines)
    ]
    content = "\n".join(json.dumps(line) for line in work).encode()
    file = client.files.create(file=("a.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    return batch.id


def answered(client: openai.OpenAI, batch: str) -> list[str]:
    """The ids of the lines of its output file, once it is complete."""
    eventually(lambda: client.batches.retrieve(batch).status == "completed")
    found = client.batches.retrieve(batch)
    assert found.output_file_id is not None
    lines = client.files.content(found.output_file_id).text.splitlines()
    return [json.loads(line)["custom_id"] for line in lines]
