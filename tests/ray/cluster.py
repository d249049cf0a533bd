"""A Ray cluster of one node, of one's own, with replicas of our server on it; what is left of it is
found by a word in its environment, and ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any
from uuid import uuid4

import httpx
import openai
import psutil
import yaml

from conserve.bench.ports import free_port

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
MARK = "CONSERVE_TEST_CLUSTER"
PATIENCE_S = 900.0
LOOK_S = 0.2
OBJECT_STORE_BYTES = 80_000_000


@dataclass(frozen=True)
class Server:
    """A replica's process, and the `conserve serve` that is its child."""

    replica: psutil.Process
    process: psutil.Process
    url: str

    def answers(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        return False

    def kill(self) -> None:
        """As a machine that loses its power: the replica first, or it would end the others."""
        below = self.replica.children(recursive=True)
        for process in (self.replica, *below):
            with suppress(psutil.NoSuchProcess):
                process.kill()


class Cluster:
    """Ray's head with Serve on it; a context manager."""

    def __init__(self, folder: Path, num_cpus: int = 4) -> None:
        self.folder = folder
        self.mark = uuid4().hex
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._address = f"127.0.0.1:{free_port()}"
        # Ray's sockets lie in it, whose paths may not be long.
        self._temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        self._environment = {
            **os.environ,
            MARK: self.mark,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Of its own: Ray listens on every address of the machine.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token_hex(32),
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        }
        self._head = self._start(num_cpus)

    def _start(self, num_cpus: int) -> subprocess.Popen[bytes]:
        words = f"start --head --block --node-ip-address 127.0.0.1 --num-cpus {num_cpus} "
        words += f"--num-gpus 0 --object-store-memory {OBJECT_STORE_BYTES} "
        words += "--include-dashboard false --disable-usage-stats --include-log-monitor false "
        words += f"--port {self._address.rpartition(':')[2]} --dashboard-agent-listen-port 0 "
        words += f"--min-worker-port 0 --max-worker-port 0 --ray-client-server-port {free_port()} "
        words += f"--temp-dir {self._temporary}"
        with (self.folder / "head.log").open("wb") as log:
            return subprocess.Popen(
                [str(BIN / "ray"), *words.split()],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def deploy(self, config: Mapping[str, Any]) -> None:
        """`serve run` with a config file, as a user does; returns when Serve has taken it."""
        file = self.folder / f"serve-{uuid4().hex}.yaml"
        http = {"host": "127.0.0.1", "port": self.port}
        file.write_text(yaml.safe_dump({**config, "http_options": http}))
        until(self._is_up, "head of Ray")
        command = [str(BIN / "serve"), "run", "--non-blocking"]
        with (self.folder / "serve.log").open("ab") as log:
            subprocess.run(
                [*command, "--address", self._address, str(file)],
                env=self._environment,
                check=True,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE_S,
            )

    def _is_up(self) -> bool:
        assert self._head.poll() is None, (self.folder / "head.log").read_text()
        return "Ray runtime started" in (self.folder / "head.log").read_text()

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(api_key="any", base_url=f"{self.url}/v1", max_retries=5, timeout=120)

    def servers(self) -> list[Server]:
        """Those whose process is there, whether they answer or not."""
        found = []
        for process in self._processes():
            with suppress(psutil.Error):
                words = process.cmdline()
                if "conserve.ray.child" in words and (replica := process.parent()):
                    port = words[words.index("--port") + 1]
                    found.append(Server(replica, process, f"http://127.0.0.1:{port}"))
        return found

    def wait_for(self, num_servers: int) -> list[Server]:
        """Until so many are there, and all of them answer, through Serve, too."""

        def ready() -> bool:
            servers = self.servers()
            return len(servers) == num_servers and all(one.answers() for one in servers)

        until(ready, f"{num_servers} servers")
        until(self._serves, "an answer through Serve")
        return self.servers()

    def _serves(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/v1/models", timeout=30).is_success
        return False

    def logs(self, last: int = 3000) -> str:
        """The ends of what Serve and its replicas have written."""
        folder = Path(self._temporary) / "session_latest" / "logs"
        files = [*folder.glob("serve/*.log"), *folder.glob("worker-*.err")]
        return "\n".join(f"== {file.name}\n{file.read_text()[-last:]}" for file in files)

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def end(self) -> None:
        """Everything that carries the mark: Ray starts what dies anew while its head lives."""
        below = psutil.Process(self._head.pid).children(recursive=True)
        with suppress(ProcessLookupError):
            os.killpg(self._head.pid, signal.SIGKILL)
        self._head.wait()

        def gone() -> bool:
            left = [process for process in {*below, *self._processes()} if process.is_running()]
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            return not left

        until(gone, "the end of all processes")
        shutil.rmtree(self._temporary, ignore_errors=True)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"no {what}"
        time.sleep(LOOK_S)
