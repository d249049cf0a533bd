"""Arrivals are seen while a forward runs, whichever of several API servers they come through."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.stops.tiny_server import ask, documents, flags, harvesting

pytestmark = [pytest.mark.server, pytest.mark.long]

SERVED = re.compile(r"\(\w*Server\w* pid=(\d+)\).*Received request cmpl-default-")


def num_served(server: Any) -> Counter[str]:
    return Counter(SERVED.findall(server.log.read_text()))


def num_noticed(server: Any) -> float:
    """Online arrivals that met a stoppable step: those that stopped it and those that did not.
    Figures come with a step's outputs, so two more steps bring all that was counted by now."""
    steps, deadline = server.metric("conserve:steps_total"), time.monotonic() + 60
    while server.metric("conserve:steps_total") < steps + 2:
        assert time.monotonic() < deadline, "no steps are made"
    stopped = server.metric("conserve:stopped_steps_total")
    return float(stopped + server.metric("conserve:unstopped_arrivals_total"))


def test_arrivals_through_either_stop_the_step_that_runs(
    start_server: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """Chats one at a time, until the engine has noticed one from each server."""
    with start_server(
        *flags(tiny_model, tmp_path, "--api-server-count", "2", "--enable-log-requests")
    ) as server:
        noticed: Counter[str] = Counter()
        with harvesting(server):
            for number, chat in enumerate(documents(3, 60, length=60)):
                before, served = num_noticed(server), num_served(server)
                ask(server, chat, cache_salt=str(number))
                ((through, _),) = (num_served(server) - served).items()
                noticed[through] += num_noticed(server) > before
                if len(+noticed) == 2:
                    break
        assert len(+noticed) == 2, f"noticed through each: {noticed}"
        assert server.metric("conserve:stopped_steps_total") > 0
