"""Several API servers: arrivals through each are seen in a forward, and streams end whole."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
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


NUM_STREAMS = 6


def stream(server: Any, prompt: str, begun: threading.Barrier) -> str | None:
    """How a stream ends that goes on for long after all have begun: the reason in its last chunk,
    which is an error where it was cut."""
    body = {"prompt": prompt, "max_tokens": 1900, "stream": True, "ignore_eos": True}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=600) as reply:
        lines = filter(None, reply.iter_lines())
        seen = [next(lines)]
        begun.wait(300)
        seen += lines
    last = json.loads(seen[-2].removeprefix("data: "))
    return str(last["choices"][0]["finish_reason"]) if "choices" in last else None


def test_streams_end_whole_when_the_server_is_told_to_end(
    start_server: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """Two engines, and an API server for each: neither owns them."""
    limit = ("--data-parallel-size", "2", "--shutdown-timeout", "300")
    with start_server(*flags(tiny_model, tmp_path, *limit)) as server:
        begun = threading.Barrier(NUM_STREAMS + 1)
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            asked = [
                pool.submit(stream, server, prompt, begun)
                for prompt in documents(4, NUM_STREAMS, length=100)
            ]
            begun.wait(300)
            server.process.send_signal(signal.SIGTERM)
            assert [one.result() for one in asked] == ["length"] * NUM_STREAMS
        assert server.process.wait(300) == 0
