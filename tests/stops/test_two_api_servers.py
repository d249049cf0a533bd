"""Arrivals are seen while a forward runs, whichever of several API servers they come through."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tiny_server import ask, documents, flags, harvesting

pytestmark = [pytest.mark.server, pytest.mark.long]

SERVED = re.compile(r"\(\w*Server\w* pid=(\d+)\).*Received request cmpl-default-")


def num_served(server: Any) -> Counter[str]:
    return Counter(SERVED.findall(server.log.read_text()))


def num_noticed(server: Any) -> float:
    """Online arrivals that met a stoppable step: those that stopped it and those that did not."""
    stopped = server.metric("conserve:stopped_steps_total")
    return float(stopped + server.metric("conserve:unstopped_arrivals_total"))


def test_arrivals_through_either_stop_the_step_that_runs(
    start_server: Any, tiny_model: Path, tmp_path: Path
) -> None:
    with start_server(
        *flags(tiny_model, tmp_path, "--api-server-count", "2", "--enable-log-requests")
    ) as server:
        chats = documents(3, 24, length=60)
        alone = [ask(server, chat, cache_salt="alone") for chat in chats]
        before = num_served(server)
        with harvesting(server):
            busy = [ask(server, chat, cache_salt="busy") for chat in chats]
        assert busy == alone
        served = num_served(server) - before
        assert len(served) == 2, "both API servers answered"
        assert num_noticed(server) > max(served.values()), "more than came through either alone"
        assert server.metric("conserve:stopped_steps_total") > 0
