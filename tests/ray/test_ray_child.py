"""A replica's server ends with the replica, however that ends, and says what was wrong with it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from conserve.bench import ports
from conserve.ray import child, flags
from conserve.server.errors import BadInputError

pytestmark = pytest.mark.anyio

PATIENCE_S = 60.0
BOUND = "import os, signal; from conserve.ray.child import end_with; end_with(os.getppid()); "
SAY = "print(os.getpid(), flush=True); signal.pause()"
PARENT = f"""
import subprocess, sys, signal
subprocess.Popen([sys.executable, "-c", {BOUND + SAY!r}])
signal.pause()
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_a_killed_replica_takes_its_server_along() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        gone, _ = psutil.wait_procs([server], PATIENCE_S)
    assert gone == [server]


def test_one_whose_parent_ended_before_it_began_ends() -> None:
    with pytest.raises(SystemExit):
        child.end_with(os.getpid())  # nobody is its own parent


async def test_a_wrong_flag_is_what_the_replica_says(tmp_path: Path) -> None:
    one = await child.start(["--slo-ttft-ms", "-3"], "127.0.0.1", 9, tmp_path)
    with pytest.raises(child.ChildEndedError, match="ended with status 2: --slo-ttft-ms: must be"):
        async with asyncio.timeout(PATIENCE_S):
            await one.ready()
    with pytest.raises(child.ChildEndedError, match="ended with status 2"):
        await one.check_health()
    await one.stop()


ENGINE = """
import sys
from conserve.ray import child
from conserve.server.errors import StartError
from conserve.server.start import serve

def no_memory(flags):
    raise StartError("no memory: " + flags[0])

serve.serve = no_memory
child.main()
"""


async def test_so_is_why_the_engine_did_not_start(tmp_path: Path) -> None:
    reason = tmp_path / "reason"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ENGINE, str(os.getpid()), str(reason), "of this model"
    )
    one = child.Child(process, "http://127.0.0.1:9", reason)
    with pytest.raises(
        child.ChildEndedError, match="ended with status 1: no memory: of this model"
    ):
        async with asyncio.timeout(PATIENCE_S):
            await one.ready()
    await one.stop()


async def test_one_that_is_stopped_while_it_starts_ends_in_silence(tmp_path: Path) -> None:
    starts = ENGINE.replace("raise StartError", "import os; os.kill(os.getpid(), 15); raise Error")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        starts,
        str(os.getpid()),
        str(tmp_path / "reason"),
        "-",
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert said == b"conserve serve: ended by SIGTERM.\n"


async def test_stopping_asks_first(tmp_path: Path) -> None:
    asks = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print(flush=True)"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        f"{asks}; signal.pause()",
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.readline()
    one = child.Child(process, "http://127.0.0.1:9", tmp_path / "reason")
    await one.stop()
    assert process.returncode == 7


@pytest.mark.parametrize(
    ("drain_s", "status"), [(PATIENCE_S, 7), pytest.param(0.0, -9, id="control: it has no time")]
)
async def test_what_has_begun_has_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drain_s: float, status: int
) -> None:
    monkeypatch.setattr(child, "END_S", 0.0)
    ends = "import signal, sys; signal.signal(15, lambda *_: (sys.stdin.read(), sys.exit(7)))"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        f"{ends}; print(flush=True); signal.pause()",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    await process.stdout.readline()
    one = child.Child(process, "http://127.0.0.1:9", tmp_path / "reason", drain_s)
    stopping = asyncio.create_task(one.stop())
    await asyncio.sleep(0)
    if drain_s:
        process.stdin.close()  # it has ended what it had begun
    await stopping
    assert process.returncode == status


def test_its_time_is_the_servers() -> None:
    assert flags.drain_s(flags.with_dashes({"shutdown_timeout": 120})) == 120
    assert flags.drain_s({}) == 0


async def test_what_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "END_S", 0.01)
    deaf = "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); signal.pause()"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", deaf, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    one = child.Child(process, "http://127.0.0.1:9", tmp_path / "reason")
    await one.stop()
    assert process.returncode == -signal.SIGKILL


def test_replicas_of_a_node_take_the_ports_from_one_on() -> None:
    taken = child.port_of("127.0.0.1", 0)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", taken))
        listening.listen()
        assert taken < child.port_of("127.0.0.1", taken) < taken + ports.NUM_TRIED
    assert flags.place({"port": 8100, "host": "::"}, 3) == ("::", 8103)
    assert flags.place({}, 3) == ("127.0.0.1", 0)


def test_a_host_that_is_not_here_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"No port of 192.0.2.77 .* args.flags.host"):
        child.port_of("192.0.2.77", 0)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("10.0.0.7", "http://10.0.0.7:80"),
    ],
)
def test_where_a_server_is_reached(host: str, url: str) -> None:
    assert child.url_of(host, 80) == url
