"""Replicas in processes of their own: started, asked, killed and ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
from fleet.replica import MODEL

ROOT = Path(__file__).parents[2]
CHAT: Final = "/v1/chat/completions"
LIMIT_S = 1800.0


class Replica:
    """`folder` is its own: of others it knows what the database says, as on another machine."""

    def __init__(
        self, folder: Path, slots: int, line_s: float, environment: Mapping[str, str]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._port_file = folder, folder / "port"
        self._port_file.unlink(missing_ok=True)
        words = [str(self._port_file), str(slots), str(line_s)]
        place = {"CONSERVE_BATCH_DATA_DIR": str(folder / "data"), **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fleet.replica", *words],
            cwd=ROOT,
            env={**os.environ, **place},
        )

    def wait(self) -> None:
        until(self._port_file.exists, "a replica does not start")
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self._port_file.read_text()}", timeout=60
        )

    def measured(self) -> dict[str, Any]:
        """Since it was asked last."""
        return dict(self.http.get("/measured").json())

    @property
    def worker_id(self) -> str:
        """What the database calls it: the name of the lock file that it holds."""
        files = Path(f"/proc/{self.process.pid}/fd").iterdir()
        (lock,) = (path for file in files if (path := file.resolve()).parent.name == "workers")
        return lock.name

    def submit(self, num_lines: int, key: str = "any") -> str:
        """Id of a new batch of so many chats."""
        headers = {"authorization": f"Bearer {key}"}
        content = b"".join(chat_line(number) for number in range(num_lines))
        upload = {"file": ("in.jsonl", content)}
        file = self.http.post(
            "/v1/files", headers=headers, files=upload, data={"purpose": "batch"}
        ).raise_for_status()
        wish = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
        made = self.http.post("/v1/batches", headers=headers, json=wish).raise_for_status()
        return str(made.json()["id"])

    def batch(self, batch_id: str, key: str = "any") -> dict[str, Any]:
        headers = {"authorization": f"Bearer {key}"}
        return dict(self.http.get(f"/v1/batches/{batch_id}", headers=headers).json())

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def chat_line(number: int) -> bytes:
    """About 500 bytes, as a question with a paragraph has."""
    content = f"{number}: " + "Some words of a document. " * 12
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 100}
    line = {"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body}
    return json.dumps(line).encode() + b"\n"


@contextmanager
def replicas(
    folder: Path, count: int, slots: int, line_s: float, environment: Mapping[str, str]
) -> Iterator[list[Replica]]:
    made = [Replica(folder / str(n), slots, line_s, environment) for n in range(count)]
    try:
        for each in made:
            each.wait()
        yield made
    finally:
        for each in made:
            each.end()


def until(is_so: Callable[[], bool], complaint: str, every_s: float = 0.02) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(complaint)
        time.sleep(every_s)
