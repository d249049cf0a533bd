"""A PostgreSQL server of one's own, on loopback in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from conserve.bench.ports import free_port

FOLDERS = ("/usr/local/bin", *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin"))))


def binary(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(FOLDERS))


class Postgres:
    """Started by construction, with `settings` such as "fsync=off"; `halt` and `resume` play an
    outage; `close` removes everything."""

    def __init__(self, *settings: str) -> None:
        self._settings = settings
        self.folder = Path(tempfile.mkdtemp(prefix="conserve-pg-"))
        # postgres refuses to run as root.
        self._as: dict[str, Any] = {}
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self.port = free_port()
        self._run("initdb", "-D", self.data, "-U", "tester", "-A", "trust", "-N", "-E", "UTF8")
        self.resume()

    @property
    def data(self) -> str:
        return str(self.folder / "data")

    def url(self, database: str) -> str:
        return f"postgresql+asyncpg://tester@127.0.0.1:{self.port}/{database}"

    def dsn(self, database: str) -> str:
        return f"postgresql://tester@127.0.0.1:{self.port}/{database}"

    def resume(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' "
        options += " ".join(f"-c {setting}" for setting in self._settings)
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", self.data, "-l", log, "-w", "-o", options, "start")

    def resume_if_halted(self) -> None:
        if not (self.folder / "data" / "postmaster.pid").exists():
            self.resume()

    def halt(self) -> None:
        self._run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop")

    def close(self) -> None:
        self.halt()
        shutil.rmtree(self.folder)

    def _run(self, name: str, *words: str) -> None:
        program = binary(name)
        assert program is not None
        subprocess.run(
            [program, *words], check=True, cwd=self.folder, stdout=subprocess.DEVNULL, **self._as
        )
