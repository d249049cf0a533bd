"""`conserve serve` on the tiny model: flags, and clients that keep it busy."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from tests.stops.tiny_llama import random_text

EAGER = {"stop": "eager", "profile_seconds": 1, "stop_response_s": 1e-6}


def flags(model: Path, folder: Path, *more: str, kv: str = "64M") -> list[str]:
    """Eager stops at every layer, short steps, answers exact in float32. 64 MiB of KV are 10,000
    tokens."""
    return [
        *(str(model), "--dtype", "float32", "--enforce-eager", "--block-size", "32"),
        *("--max-num-batched-tokens", "256", "--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", kv, "--no-batches"),
        *("--profile-dir", str(folder / "profiles")),
        *("--additional-config", json.dumps({"conserve": EAGER})),
        *more,
    ]


def ask(server: Any, prompt: str, *, tier: str = "default", max_tokens: int = 4, **how: Any) -> str:
    """The greedy answer, as the token strings of its logprobs: random bytes make no text. Over
    a connection of its own."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"service_tier": tier, "logprobs": 0, **how}
    # With the tier in its name, the log of requests tells one from the other.
    named = {"x-request-id": f"{tier}-{uuid4()}"}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, headers=named, timeout=900)
    assert reply.status_code == 200, reply.text
    return json.dumps(reply.json()["choices"][0]["logprobs"]["tokens"])


def documents(seed: int, count: int, length: int = 1500) -> list[str]:
    chance = random.Random(seed)
    return [random_text(chance, length) for _ in range(count)]


@contextmanager
def harvesting(server: Any, num_clients: int = 4, seed: int = 99) -> Iterator[None]:
    """Keep offline requests of new documents in the engine for the length of a `with`."""
    done = threading.Event()

    def work(client: int) -> int:
        chance = random.Random(seed * 1000 + client)
        count = 0
        while not done.is_set():
            ask(server, random_text(chance, 1500), tier="flex", max_tokens=2)
            count += 1
        return count

    with ThreadPoolExecutor(num_clients) as pool:
        futures = [pool.submit(work, client) for client in range(num_clients)]
        try:
            yield
        finally:
            done.set()
        assert all(future.result() for future in futures)
