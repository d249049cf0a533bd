"""A server that is started again whenever it ends, as a supervisor does it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

START_LIMIT_S = 300.0
LOOK_S = 0.2


class Supervised:
    """`url` stays the same. Its output goes through a pipe: a limit on the size of files is none
    on its log."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], url: str, log: Path
    ) -> None:
        self.url, self.log = url, log
        self.num_starts = 0
        self._command, self._environment = list(command), {**os.environ, **environment}
        self._closing = threading.Event()
        self._cats: list[subprocess.Popen[bytes]] = []
        self._process = self._start()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _start(self) -> subprocess.Popen[bytes]:
        self.num_starts += 1
        with self.log.open("ab") as file:
            cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
        self._cats.append(cat)
        assert cat.stdin is not None
        with cat.stdin as pipe:
            return subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=pipe,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_S):
            if self._process.poll() is not None:
                self._process = self._start()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            time.sleep(LOOK_S)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def tree(self) -> list[psutil.Process]:
        """The server's processes that are there now, the API's first."""
        with suppress(psutil.NoSuchProcess):
            server = psutil.Process(self.pid)
            return [server, *server.children(recursive=True)]
        return []

    def end(self, number: signal.Signals) -> None:
        """Of the API's process."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        for cat in self._cats:
            cat.wait()
