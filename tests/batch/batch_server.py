"""A batch server over the fake model, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from openai.types import Batch

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0


class Server:
    """One process of `crash_server.py`."""

    def __init__(self, folder: Path, kill_at: str = "never", **settings: Any) -> None:
        folder.mkdir(exist_ok=True)
        self._port_file = folder.absolute() / "port"
        self._port_file.unlink(missing_ok=True)
        named = {f"CONSERVE_BATCH_{key.upper()}": str(value) for key, value in settings.items()}
        named.setdefault("CONSERVE_BATCH_DATA_DIR", str(folder))
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.batch.crash_server",
                str(self._port_file.absolute()),
                kill_at,
            ],
            cwd=ROOT,
            env={**os.environ, "CONSERVE_BATCH_POLL_S": "0.05", **named},
        )

    def wait(self) -> bool:
        """Until it serves (True) or is dead."""
        patience = time.monotonic() + PATIENCE_S
        while not self._port_file.exists():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < patience
            time.sleep(0.02)
        return True

    @property
    def client(self) -> openai.OpenAI:
        url = f"http://127.0.0.1:{self._port_file.read_text()}/v1"
        return openai.OpenAI(api_key="any", base_url=url, max_retries=0)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait()


def counts(batch: Batch) -> tuple[int, int, int]:
    """Lines in all, completed, failed."""
    found = batch.request_counts
    assert found is not None
    return found.total, found.completed, found.failed


def output_lines(client: openai.OpenAI, batch: Batch) -> list[dict[str, Any]]:
    assert batch.output_file_id is not None
    return [json.loads(text) for text in client.files.content(batch.output_file_id).iter_lines()]


@contextmanager
def server(folder: Path, kill_at: str = "never", **settings: Any) -> Iterator[Server]:
    one = Server(folder, kill_at, **settings)
    try:
        yield one
    finally:
        one.kill()
