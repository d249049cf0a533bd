"""Ten minutes of everything at once on a real server; nothing may be lost. See `make soak`."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from tests.stops.tiny_llama import random_text
from tests.stops.tiny_server import ask, flags

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1500)]

DURATION_S = float(os.environ.get("CONSERVE_SOAK_SECONDS", "600"))
NUM_CHATTERS, NUM_HARVESTERS, NUM_QUITTERS = 3, 5, 2


class Client:
    """One client's requests, one after another, until time is up. Counts what came of them."""

    def __init__(self, server: Any, seed: int, until_s: float) -> None:
        self.server, self.until_s = server, until_s
        self.chance = random.Random(seed)
        self.counts: Counter[str] = Counter()

    def repeat(self, act: Callable[[], None], longest_pause_s: float) -> Counter[str]:
        while time.monotonic() < self.until_s:
            act()
            time.sleep(self.chance.random() * longest_pause_s)
        return self.counts

    def chat(self) -> None:
        self._whole("default", self.chance.randrange(20, 200), self.chance.randrange(1, 12))

    def harvest(self) -> None:
        self._whole("flex", self.chance.randrange(100, 1800), self.chance.randrange(1, 40))

    def _whole(self, tier: str, length: int, max_tokens: int) -> None:
        text = random_text(self.chance, length)
        ask(self.server, text, tier=tier, max_tokens=max_tokens)
        self.counts[f"{tier} answered"] += 1

    def quit(self) -> None:
        """Ask, and hang up at some point: before the first token, or in the middle."""
        tier = self.chance.choice(["default", "flex"])
        prompt = random_text(self.chance, self.chance.randrange(100, 1500))
        body = {"prompt": prompt, "max_tokens": 400, "stream": True, "ignore_eos": True}
        patience = self.chance.choice([0.005, 0.02, 0.1, 0.5])
        try:
            with httpx.stream(
                "POST",
                f"{self.server.url}/v1/completions",
                json=body | {"service_tier": tier},
                timeout=httpx.Timeout(30, read=patience),
            ) as reply:
                for _ in zip(reply.iter_lines(), range(self.chance.randrange(6)), strict=False):
                    pass
        except httpx.ReadTimeout:
            pass
        self.counts[f"{tier} cancelled"] += 1


def settle(server: Any) -> None:
    """Wait until the engine has nothing left to do."""
    deadline = time.monotonic() + 60
    busy = ("conserve:running_requests", "conserve:waiting_requests")
    while any(server.metric(name) for name in busy):
        assert time.monotonic() < deadline, "requests remain in the engine"
        time.sleep(0.2)


def test_nothing_is_lost(start_server: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Every request is answered in full or was cancelled by its client, every block comes back,
    and what is asked at the end is answered as at the start."""
    probes = [random_text(random.Random(i), 300) for i in range(6)]
    # Scarce: 2,700 tokens of KV, for up to 16 requests of up to 1,840.
    with start_server(*flags(tiny_model, tmp_path, kv="16M")) as server:
        first = [ask(server, text, max_tokens=16, cache_salt="first") for text in probes]
        until_s = time.monotonic() + DURATION_S
        with ThreadPoolExecutor(NUM_CHATTERS + NUM_HARVESTERS + NUM_QUITTERS) as pool:
            kinds = ["chat"] * NUM_CHATTERS + ["harvest"] * NUM_HARVESTERS + ["quit"] * NUM_QUITTERS
            pauses = {"chat": 0.4, "harvest": 0.02, "quit": 0.3}
            futures = []
            for i, kind in enumerate(kinds):
                client = Client(server, i, until_s)
                futures.append(pool.submit(client.repeat, getattr(client, kind), pauses[kind]))
            counts = sum((future.result() for future in futures), Counter())
        settle(server)
        assert server.metric("conserve:kv_blocks") == 0, "blocks were lost"
        last = [ask(server, text, max_tokens=16, cache_salt="last") for text in probes]
        assert last == first
        assert min(counts[f"{tier} answered"] for tier in ("default", "flex")) > DURATION_S / 10
        stops = server.metric("conserve:stopped_steps_total")
        figures = {"stops": stops} | {
            name: server.metric(f"conserve:{name}_total")
            for name in ("stopped_layers", "displaced_requests", "dropped_tokens")
        }
        print(f"soak of {DURATION_S:g} s: {dict(counts)}, {figures}")  # noqa: T201
        assert stops > DURATION_S / 10
        assert "Traceback" not in server.log.read_text()
