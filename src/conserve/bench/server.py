"""One arm's server: a fresh process group, waited for, watched, and ended with its children."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from conserve.batch.connection import client_for

LOG_END_LINES = 25
END_S = 20.0
START_LIMIT_S = 1800.0
"""A server that dies is seen at once; this only ends one that hangs, on however slow a machine."""


class ServerDiedError(RuntimeError):
    """The server ended, or did not answer in time; the message holds the end of its log."""


class Server:
    """A server process. As a context manager it is ended, with its whole group, on the way out."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], port: int, log: Path
    ) -> None:
        self.base_url = f"http://127.0.0.1:{port}"
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def check(self, grace_s: float = 0.0) -> None:
        """Raise ServerDiedError if the process has ended, or does within `grace_s`."""
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(grace_s)
            raise ServerDiedError(f"the server ended with status {code}\n{self.log_end()}")

    def wait_until_healthy(self, timeout_s: float = START_LIMIT_S) -> float:
        """Return when /health answers 200; the seconds that took. Raises ServerDiedError."""
        started_s = time.monotonic()
        with client_for(self.base_url, timeout=5.0) as http:
            while time.monotonic() - started_s < timeout_s:
                self.check()
                with suppress(httpx.TransportError):
                    if http.get(f"{self.base_url}/health").status_code == 200:
                        return time.monotonic() - started_s
                time.sleep(0.5)
        raise ServerDiedError(f"no answer on /health in {timeout_s:.0f} s\n{self.log_end()}")

    def log_end(self) -> str:
        """The last lines of what the server wrote."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_END_LINES:])

    def end(self) -> None:
        """Ask the server to end, then end whatever is left of its group."""
        group = self._process.pid
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=END_S)
        # Children of a server that died or hung live on in its group.
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._process.wait()
        _wait_until_gone(group)


def _wait_until_gone(group: int) -> None:
    """Until no process of the group runs: the next arm must not share the machine with it."""
    deadline_s = time.monotonic() + END_S
    while time.monotonic() < deadline_s:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.1)
