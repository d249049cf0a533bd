"""Samples, updates and samples again on a real server: nothing of the old weights outlives an
update, neither in the prefix cache nor on the host.

tests/engine/test_resets.py plays updates at every moment without a server.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from tests.conftest import Server, StartServer
from tests.examples.conftest import counted, run_program
from tests.stops.tiny_llama import make_model, random_text
from tests.stops.tiny_server import ask, flags

pytestmark = pytest.mark.server

CONVERSATION = random_text(random.Random(1), 900)
SALTS = count()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def rl_server(
    start_server: StartServer, policy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A tiny model with vLLM's routes for such loops, one thread a worker."""
    arguments = flags(policy, tmp_path_factory.mktemp("rl"), "--served-model-name", "policy")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_SERVER_DEV_MODE", "1")
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment.setenv("OMP_NUM_THREADS", "1")
        with start_server(*arguments) as server:
            yield server


def answer(server: Server) -> str:
    """To a conversation that the server may have KV of."""
    return ask(server, CONVERSATION, max_tokens=16)


def answer_anew(server: Server) -> str:
    """To the same, with nothing to find: KV is shared only between requests of one salt."""
    return ask(server, CONVERSATION, max_tokens=16, cache_salt=f"salt-{next(SALTS)}")


def order(server: Server, path: str, **body: Any) -> None:
    httpx.post(f"{server.url}{path}", json=body or None, timeout=600).raise_for_status()


def test_what_it_samples_and_what_the_server_forgets(
    rl_server: Server, policy: Path, tmp_path: Path
) -> None:
    old = answer(rl_server)
    assert answer(rl_server) == old
    assert rl_server.metric("conserve:prefix_hit_tokens_total", **{"class": "online"}) > 0
    with counted(rl_server, online=0, offline=24):
        told = run_program(rl_server, tmp_path, "rl_loop.py", str(policy))
    assert len(re.findall(r"^round [123]: mean reward [01]\.\d{3}$", told, re.MULTILINE)) == 3
    new = answer(rl_server)
    assert new != old
    assert new == answer_anew(rl_server)


def test_an_update_that_keeps_kv_is_seen(rl_server: Server, policy: Path, tmp_path: Path) -> None:
    """The careless variant: `clear_cache=false`."""
    other = make_model(tmp_path / "other", seed=7)
    answer(rl_server)
    order(rl_server, "/pause?mode=keep&clear_cache=false")
    order(
        rl_server, "/collective_rpc", method="reload_weights", kwargs={"weights_path": str(other)}
    )
    order(rl_server, "/resume")
    assert answer(rl_server) != answer_anew(rl_server)
    order(rl_server, "/pause?mode=keep&clear_cache=true")
    order(rl_server, "/resume")
    assert answer(rl_server) == answer_anew(rl_server)
