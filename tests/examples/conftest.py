"""Programs of examples/ as a reader starts them, and what the server counted of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Server
from tests.waiting import LIMIT_S, eventually

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

RunExample = Callable[..., str]


def environment(server: Server, **more: str) -> dict[str, str]:
    """Nothing of a hub, and no bar of progress in what is told."""
    return {
        **os.environ,
        "CONSERVE_URL": server.url,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
        **more,
    }


@pytest.fixture
def example(server: Server, tmp_path: Path) -> RunExample:
    """Run one of the programs against the shared server; what it told. It has to succeed."""

    def run(name: str, *arguments: str) -> str:
        return run_program(server, tmp_path, name, *arguments)

    return run


def run_program(server: Server, folder: Path, name: str, *arguments: str) -> str:
    """In a folder of its own, as a program that was copied from here."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env=environment(server, HF_DATASETS_CACHE=str(folder / "datasets")),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def asked(server: Server) -> tuple[int, int]:
    """Requests that came to the engine: online, offline."""
    online, offline = (
        server.metric("conserve:requests_total", **{"class": name})
        for name in ("online", "offline")
    )
    return int(online), int(offline)


@contextmanager
def counted(server: Server, *, online: int, offline: int) -> Iterator[None]:
    """The server gets so many requests of each class in the course of the `with`, and no others."""
    before = asked(server)
    yield

    def more() -> tuple[int, int]:
        after = asked(server)
        return after[0] - before[0], after[1] - before[1]

    eventually(lambda: sum(more()) >= online + offline)
    assert more() == (online, offline), "online, offline"
