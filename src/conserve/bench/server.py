"""One arm's server: a fresh process group, waited for, watched, and ended with its children."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import httpx

LOG_END_LINES = 25
END_S = 20.0


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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def check(self) -> None:
        """Raise ServerDiedError if the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerDiedError(f"the server ended with status {code}\n{self.log_end()}")

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Return when /health answers 200. Raises ServerDiedError."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            self.check()
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.base_url}/health", timeout=5.0).status_code == 200:
                    return
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


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_gone(group: int) -> None:
    """Until no process of the group runs: the next arm must not share the machine with it."""
    deadline_s = time.monotonic() + END_S
    while time.monotonic() < deadline_s:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.1)
