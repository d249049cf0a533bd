"""An engine process outlives its server by no more than its way out takes."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading

import pytest

pytest.importorskip("vllm")

from conserve.engine.orphan import end_with_parent

pytestmark = pytest.mark.engine

PATIENCE_MS = 60_000
SERVER = """
import multiprocessing, os, signal, sys, threading
from conserve.engine import orphan

def engine():
    if sys.argv[1] == "stubborn":
        orphan.GRACE_S = 0.0
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert orphan.end_with_parent()
    print(os.getpid(), flush=True)
    threading.Event().wait()

process = multiprocessing.get_context("fork").Process(target=engine, name="EngineCore_DP0")
process.start()
process.join()
"""


@pytest.mark.parametrize("engine", ["obedient", "stubborn"])
def test_an_engine_ends_when_its_server_is_killed(engine: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SERVER, engine]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        handle = os.pidfd_open(int(server.stdout.readline()))
        server.kill()
    ended = select.poll()
    ended.register(handle, select.POLLIN)
    try:
        assert ended.poll(PATIENCE_MS), "the engine lives on"
    finally:
        os.close(handle)


def test_an_engine_in_a_program_of_its_own_is_left_alone() -> None:
    before = threading.active_count()
    assert not end_with_parent()
    assert threading.active_count() == before
