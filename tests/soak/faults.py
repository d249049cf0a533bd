"""What goes wrong, and what operators do, at random moments."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.soak.server import Supervised

SHORT_S = 4.0
"""Of an outage, at most."""
SMALL_FILE = 4096


class Faults:
    """Each method is one. They end before they return, but for those that end the server."""

    def __init__(self, server: Supervised, checkpoints: Path, database: Any, seed: int) -> None:
        """database: a `Postgres`, or the path of an SQLite file."""
        self.counts: Counter[str] = Counter()
        self._server, self._checkpoints, self._database = server, checkpoints, database
        self._chance = random.Random(seed)
        self._deadly = False

    def run(self, until_s: float, longest_pause_s: float, *, deadly: bool) -> None:
        self._deadly = deadly
        kinds = [self.pause, self.sleep, self.reset, self.database, self.full_disk, self.lost_kv]
        deaths = [self.kill_server, self.kill_engine, self.terminate]
        while time.monotonic() < until_s:
            time.sleep(self._chance.random() * longest_pause_s)
            dies = deadly and self._chance.random() < 0.15
            fault: Callable[[], None] = self._chance.choice(deaths if dies else kinds)
            fault()
            self.counts[fault.__name__] += 1
            if dies:
                self._server.wait_until_ready()

    def _short(self) -> None:
        time.sleep(self._chance.random() * SHORT_S)

    def _order(self, path: str, **query: str) -> None:
        """An operator's word; one that the server cannot take is no fault of its."""
        try:
            reply = httpx.post(f"{self._server.url}{path}", params=query, timeout=120)
        except httpx.TransportError:
            self.counts["orders not heard"] += 1
            return
        if self._deadly and reply.status_code >= 500:
            self.counts["orders to a dead engine"] += 1
            return
        assert reply.status_code == 200, f"{path} {query}: {reply.text}"

    def _mode(self) -> str:
        return self._chance.choice(["keep", "wait", "abort"])

    # Operators

    def pause(self) -> None:
        self._order("/pause", mode=self._mode())
        self._short()
        self._order("/resume")

    def sleep(self) -> None:
        self._order("/sleep", level=self._chance.choice("01"), mode=self._mode())
        self._short()
        self._order("/wake_up")

    def reset(self) -> None:
        self._order("/reset_prefix_cache", reset_running_requests="true", reset_external="true")

    def terminate(self) -> None:
        self._server.end(signal.SIGTERM)

    # Deaths

    def kill_server(self) -> None:
        self._server.end(signal.SIGKILL)

    def kill_engine(self) -> None:
        for process in self._server.tree():
            with suppress(psutil.NoSuchProcess):
                if "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline()):
                    process.kill()

    # Disks and databases

    def database(self) -> None:
        """PostgreSQL goes and comes back; an SQLite file is somebody else's for a while."""
        if isinstance(self._database, Path):
            with suppress(sqlite3.OperationalError):
                connection = sqlite3.connect(self._database, timeout=10, isolation_level=None)
                connection.execute("BEGIN EXCLUSIVE")
                self._short()
                connection.execute("ROLLBACK")
                connection.close()
            return
        self._database.halt()
        self._short()
        self._database.resume()

    def full_disk(self) -> None:
        """No file of the API's process can grow for a while."""
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            pid = self._server.pid
            before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILE, before[1]))
            self._short()
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    def lost_kv(self) -> None:
        """The file of the checkpoints' disk loses what it holds."""
        for process in self._server.tree():
            for link in Path(f"/proc/{process.pid}/fd").glob("*"):
                with suppress(OSError):
                    if os.readlink(link).startswith(str(self._checkpoints)):
                        os.truncate(link, 0)
