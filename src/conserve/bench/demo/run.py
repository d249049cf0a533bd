"""`conserve demo`: chat alone, then chat while documents are summarised in its idle time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx

from conserve.batch.connection import async_client_for
from conserve.bench.demo.client import DemoClient, DemoError, Seen
from conserve.bench.demo.results import Period, Results, write_results
from conserve.bench.demo.screen import Screen
from conserve.bench.demo.texts import chat_prompts, documents
from conserve.bench.server import Server, ServerDiedError, free_port
from conserve.workload.arrivals import Bursts

DRAIN_S = 2.0
"""Between the two periods, so that neither's last chats burden the other's first."""


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """How long each period lasts, in seconds, and how chat comes.

    The second period ends when the last document is summarised, `together_s` at the latest.
    Both periods repeat the same bursts, with different questions.
    """

    alone_s: float = 56.0
    together_s: float = 168.0
    chats: int = 42
    burst_size: int = 6
    seed: int = 7

    def __post_init__(self) -> None:
        for name in ("alone_s", "together_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, not {getattr(self, name):g}")

    def arrivals_s(self) -> list[float]:
        """When chats come within one span of `alone_s`."""
        bursts = Bursts(kind="bursts", num_requests=self.chats, burst_size=self.burst_size)
        return bursts.times(Random(self.seed), self.alone_s)  # noqa: S311 - a schedule


def run_demo(
    model: str, command: Callable[[int], list[str]], folder: Path, plan: DemoPlan
) -> Results:
    """Start the server, run both periods, leave every file in `folder`.

    command(port) is how the server is started. Raises DemoError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    seen = Seen()
    screen = Screen(seen, len(documents()))
    try:
        with screen, Server(command(port), {}, port, folder / "server.log") as server:
            screen.phase(f"starting the server (its log: {folder / 'server.log'})")
            server.wait_until_healthy()
            periods = asyncio.run(_drive(server, model, seen, screen, plan))
            screen.phase("ending the server")
    except ServerDiedError as error:
        raise DemoError(str(error)) from error
    return write_results(folder, seen, periods)


async def _drive(
    server: Server, model: str, seen: Seen, screen: Screen, plan: DemoPlan
) -> tuple[Period, Period]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with async_client_for(
        server.base_url, base_url=server.base_url, timeout=120.0, limits=limits
    ) as http:
        client = DemoClient(http, model, seen)
        prompts = chat_prompts(plan.seed)
        screen.phase("warming up")
        await client.warm_up(prompts)
        sampling = asyncio.create_task(client.sample())
        refreshing = asyncio.create_task(screen.keep_fresh(client.now_s))
        try:
            alone = await _alone(client, prompts, screen, plan)
            await asyncio.sleep(DRAIN_S)
            together = await _together(client, prompts, screen, plan)
        finally:
            for task in (sampling, refreshing):
                task.cancel()
            await asyncio.gather(sampling, refreshing, return_exceptions=True)
    return alone, together


async def _alone(
    client: DemoClient, prompts: Iterator[str], screen: Screen, plan: DemoPlan
) -> Period:
    start_s = client.now_s()
    screen.phase("chat alone", start_s, start_s + plan.alone_s)
    await client.chat(prompts, [start_s + t for t in plan.arrivals_s()])
    await asyncio.sleep(max(0.0, start_s + plan.alone_s - client.now_s()))
    return Period("chat alone", start_s, client.now_s())


async def _together(
    client: DemoClient, prompts: Iterator[str], screen: Screen, plan: DemoPlan
) -> Period:
    """Chat until the last document is summarised, or the time is over."""
    start_s = client.now_s()
    screen.phase("chat, and summaries in its idle time", start_s, start_s + plan.together_s)
    spans = range(int(plan.together_s // plan.alone_s) + 1)
    times = [start_s + k * plan.alone_s + t for k in spans for t in plan.arrivals_s()]
    in_time = itertools.takewhile(lambda t: t < start_s + plan.together_s, times)
    chatting = asyncio.create_task(client.chat(prompts, list(in_time)))
    summarising = asyncio.create_task(client.summarise(documents()))
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(summarising, plan.together_s)
        end_s = client.now_s()
    finally:
        for task in (chatting, summarising):
            task.cancel()
        await asyncio.gather(chatting, summarising, return_exceptions=True)
    return Period("chat + summaries", start_s, end_s)
