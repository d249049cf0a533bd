"""What watching costs: the same load with the live page watched and not, in turn.

    python benchmarks/dashboard_cost.py [--pairs 6] [--window-s 30] [--watchers 1] [--out FILE]

One server on the default model under a constant closed loop of offline requests. Windows come in
pairs, open and closed, the first of each pair in turn. Two costs: tokens computed a second, which
on a shared machine vary by more than any page could cost; and the CPU time of the API process,
which makes the page, as a share of all the machine's CPU time. Watchers read the feed in a process
of their own: what a browser spends on drawing is spent on the reader's machine, and is not in it.
Takes pairs x 2 x (window + 3 s), and the start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import httpx
import psutil

from conserve.batch.connection import async_client_for
from conserve.bench.ports import free_port
from conserve.bench.server import Server

MODEL = "SmolLM2-135M-Instruct"
STREAMS = 16
SETTLE_S = 3.0
START_LIMIT_S = 300.0
SERVE = "from conserve.cli.main import main; main()"
WATCH = """
import sys, threading
from conserve.batch.connection import client_for
def watch():
    client = client_for(sys.argv[1], timeout=60)
    with client.stream("GET", sys.argv[1] + "/dashboard/feed") as feed:
        for _ in feed.iter_bytes():
            pass
for _ in range(int(sys.argv[2])):
    threading.Thread(target=watch, daemon=True).start()
threading.Event().wait()
"""


@dataclass(frozen=True)
class Window:
    tokens_per_s: float
    api_cpu_share: float
    """CPU time of the API process over that of all the machine's CPUs."""


@contextmanager
def serving() -> Iterator[Server]:
    port = free_port()
    flags = ["--no-batches", "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-c", SERVE, "serve", *flags, "--disable-uvicorn-access-log"]
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(command, {}, port, Path(folder) / "server.log") as server,
    ):
        server.wait_until_healthy(START_LIMIT_S)
        yield server


@asynccontextmanager
async def load(client: httpx.AsyncClient) -> Any:
    """STREAMS requests at any time, until the block ends."""
    chance = random.Random(1)

    async def stream() -> None:
        while True:
            prompt = [chance.randrange(1000, 40_000) for _ in range(200)]
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 64, "ignore_eos": True}
            answer = await client.post("/v1/completions", json={**body, "service_tier": "flex"})
            answer.raise_for_status()

    tasks = [asyncio.create_task(stream()) for _ in range(STREAMS)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def computed_tokens(client: httpx.AsyncClient) -> float:
    text = (await client.get("/metrics")).text
    name = "conserve:computed_tokens_total{"
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


async def window(
    client: httpx.AsyncClient, api: psutil.Process, seconds: float, watchers: int
) -> Window:
    """What the server does while `watchers` look."""
    command = [sys.executable, "-c", WATCH, str(client.base_url).rstrip("/"), str(watchers)]
    watching = subprocess.Popen(command) if watchers else None  # noqa: ASYNC220
    try:
        await asyncio.sleep(SETTLE_S)
        began_s, before, cpu_before_s = time.monotonic(), await computed_tokens(client), cpu_s(api)
        await asyncio.sleep(seconds)
        tokens, busy_s = await computed_tokens(client) - before, cpu_s(api) - cpu_before_s
        elapsed_s = time.monotonic() - began_s
        return Window(tokens / elapsed_s, busy_s / elapsed_s / (os.cpu_count() or 1))
    finally:
        if watching:
            watching.kill()
            watching.wait()


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure(
    server: Server, pairs: int, seconds: float, watchers: int
) -> list[dict[str, Window]]:
    found, api = [], psutil.Process(server.pid)
    url = server.base_url
    async with async_client_for(url, base_url=url, timeout=300) as client, load(client):
        await asyncio.sleep(10)
        for number in range(pairs):
            order = (watchers, 0) if number % 2 else (0, watchers)
            pair = {
                "open" if count else "closed": await window(client, api, seconds, count)
                for count in order
            }
            found.append(pair)
            print(f"pair {number + 1}: {pair}", flush=True)
    return found


def with_margin(costs: list[float]) -> str:
    margin = 2 * stdev(costs) / len(costs) ** 0.5
    return f"{mean(costs):.3%}, +/- {margin:.3%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--window-s", type=float, default=30.0)
    parser.add_argument("--watchers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.pairs < 2 or args.watchers < 1:
        parser.error("needs at least two pairs and one watcher")
    with serving() as server:
        pairs = asyncio.run(measure(server, args.pairs, args.window_s, args.watchers))
    cpu = [pair["open"].api_cpu_share - pair["closed"].api_cpu_share for pair in pairs]
    tokens = [1 - pair["open"].tokens_per_s / pair["closed"].tokens_per_s for pair in pairs]
    print(f"watching costs {with_margin(cpu)} of the machine's CPU time (two standard errors)")
    print(f"and {with_margin(tokens)} of the tokens")
    if args.out:
        record = {
            "command": "python " + " ".join(["benchmarks/dashboard_cost.py", *sys.argv[1:]]),
            "num_cpus": os.cpu_count(),
            "watchers": args.watchers,
            "window_s": args.window_s,
            "pairs": [{name: asdict(one) for name, one in pair.items()} for pair in pairs],
            "cpu_share": mean(cpu),
            "tokens_share": mean(tokens),
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
