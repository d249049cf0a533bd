"""One real server for all tests that need one, started as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers
from xdist.scheduler import LoadScopeScheduling

from conserve.bench.ports import free_port

# The same examples in every run, and no deadline: a slow machine fails nothing. Hypothesis also
# tries numbers that it reads in whatever modules are imported already, which depends on the tests
# that ran before: not here. `--hypothesis-profile random` looks among other examples.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("random", derandomize=False, deadline=None, database=None)
settings.load_profile("repeatable")
providers._get_local_constants = lambda: providers._local_constants

START_LIMIT_S = 900.0
QUIET = ("--disable-access-log-for-endpoints", "/metrics,/health")
CONSERVE = str(Path(sys.executable).with_name("conserve"))


@dataclass(frozen=True)
class Server:
    """A running `conserve serve`; `log` is what it wrote to stdout and stderr."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of one Prometheus series whose labels include `labels`."""
        total = 0.0
        found = False
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith((f"{name} ", f"{name}{{")) and all(
                f'{key}="{value}"' in line for key, value in labels.items()
            ):
                total += float(line.rsplit(" ", 1)[1])
                found = True
        assert found, f"no series {name} {labels}"
        return total


StartServer = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> StartServer:
    """A function that starts `conserve serve` with more arguments, for the length of a `with`."""

    @contextmanager
    def start(*arguments: str) -> Iterator[Server]:
        folder = tmp_path_factory.mktemp("server")
        log, port = folder / "log", free_port()
        place = ("--host", "127.0.0.1", "--port", str(port), "--data-dir", str(folder / "data"))
        with log.open("wb") as file:
            process = subprocess.Popen(
                [CONSERVE, "serve", *arguments, *QUIET, *place],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = Server(f"http://127.0.0.1:{port}", log, process)
        try:
            wait_until_ready(server)
            yield server
        finally:
            stop(process)

    return start


@pytest.fixture(scope="session")
def owner_limits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the shared server's `--owner-limits`. Who writes to it leaves it as it was."""
    path = tmp_path_factory.mktemp("limits") / "owner-limits.json"
    path.write_text("{}")
    return path


@pytest.fixture(scope="session")
def server(start_server: StartServer, owner_limits: Path) -> Iterator[Server]:
    """`conserve serve` on the default model, shared by all tests.

    The floor keeps batches going where the machine is too busy for the default targets.
    """
    with start_server("--offline-floor", "0.2", "--owner-limits", str(owner_limits)) as server:
        yield server


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            pytest.fail(f"the server ended at start:\n{server.log.read_text()[-8000:]}")
        try:
            if httpx.get(f"{server.url}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{server.log.read_text()[-8000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and whatever it started."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


MADE_ONCE = ("tests/dist", "tests/site")
"""Folders whose modules share what takes long to make. Two wheels cannot be built at once: the
names of setuptools' temporary files in the checkout are the same."""


class TwoProcesses(LoadScopeScheduling):  # type: ignore[misc]
    """What one process runs of the two of `make test`: a module, or all modules of a folder that is
    in MADE_ONCE, or all with a real server, which are the longest; two servers at once would only
    share the cores."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        if starts_servers(self.config.rootpath / module):
            return "servers"
        folder = module.rpartition("/")[0]
        return folder if folder in MADE_ONCE else module


@cache
def starts_servers(module: Path) -> bool:
    return "pytest.mark.server" in module.read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TwoProcesses:
    return TwoProcesses(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first: the short ones then fill both processes to the end."""
    items.sort(key=lambda item: (not starts_servers(item.path), not starts_engines(item.path)))


def starts_engines(module: Path) -> bool:
    """In processes of their own, on tiny models with one thread."""
    return module.parent.name in {"models", "stops"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the server's log under a test that failed with it."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(server, Server):
        report.sections.append(("server log", server.log.read_text()[-8000:]))
    return report
