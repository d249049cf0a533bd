"""`conserve demo`: chat alone, then chat while documents are summarised in its idle time."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from conserve.batch.connection import async_client_for
from conserve.bench import machine
from conserve.bench.demo.client import DemoClient, DemoError, Seen
from conserve.bench.demo.conditions import Conditions
from conserve.bench.demo.figures import Period, Results
from conserve.bench.demo.plan import DemoPlan, Wanted, plan_for
from conserve.bench.demo.results import write_results
from conserve.bench.demo.screen import Screen
from conserve.bench.demo.texts import chat_prompts, documents
from conserve.bench.ports import free_port
from conserve.bench.scale import Speed, scale_of
from conserve.bench.server import Server, ServerDiedError
from conserve.bench.speed import SpeedError, speed_of
from conserve.metrics.processors import CpuTimes, Taken, read_cpu_times, taken

TOTAL_S = 345.0
"""From the start of the first server to the end of the second period."""
DYING_S = 1.0
"""A process that breaks its connections off may be seen to have ended a little later."""
DRAIN_S = 2.0
"""Between the two periods, so that neither's last chats burden the other's first."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is served. tokenizer: the model's folder. command(port, flags) starts its server."""

    model: str
    tokenizer: str
    command: Callable[[int, Sequence[str]], list[str]]


def run_demo(subject: Subject, folder: Path, wanted: Wanted) -> Results:
    """Start the server, fit the demo to the machine, run both periods, leave every file in
    `folder`. Raises DemoError."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = Seen()
    with Screen(seen) as screen:
        try:
            return _Demo(subject, folder, wanted, seen, screen).run()
        except (ServerDiedError, SpeedError) as error:
            raise DemoError(str(error)) from error


@dataclass(frozen=True, slots=True)
class _Demo:
    subject: Subject
    folder: Path
    wanted: Wanted
    seen: Seen
    screen: Screen

    def run(self) -> Results:
        """On one server, or where the usual targets are not for this machine on a second."""
        started_s = time.monotonic()
        # While no server is there: one that has just answered looks for more work for a second.
        before = machine.probe_gflops()
        with self._server() as server:
            start_s = server.wait_until_healthy()
            self.screen.phase("measuring this machine")
            speed, measuring = self._measured(server)
            again_s = start_s if scale_of(speed) < 1 else 0.0
            left_s = TOTAL_S - (time.monotonic() - started_s) - again_s
            plan = plan_for(speed, left_s, self.wanted)
            conditions = Conditions(plan, speed, measuring, gflops=(before, 0.0))
            self.screen.fit(conditions)
            if plan.has_default_targets:
                return self._periods(server, conditions)
        flags = ["--slo-ttft-ms", f"{1000 * plan.ttft_target_s:g}"]
        flags += ["--slo-tbt-ms", f"{1000 * plan.tbt_target_s:g}"]
        with self._server(*flags) as server:
            server.wait_until_healthy()
            return self._periods(server, conditions)

    def _server(self, *flags: str) -> Server:
        port, log = free_port(), self.folder / "server.log"
        again = " again, with targets for this machine" if flags else ""
        self.screen.phase(f"starting the server{again} (its log: {log})")
        return Server(self.subject.command(port, flags), {}, port, log)

    def _measured(self, server: Server) -> tuple[Speed, Taken]:
        """The speed, and what others took of the processors meanwhile."""
        subject, started_s, before = self.subject, time.monotonic(), read_cpu_times()
        speed = asyncio.run(speed_of(server.base_url, subject.tokenizer, subject.model))
        return speed, taken(before, read_cpu_times(), time.monotonic() - started_s)

    def _periods(self, server: Server, conditions: Conditions) -> Results:
        model, plan = self.subject.model, conditions.plan
        try:
            periods = asyncio.run(_drive(server, model, self.seen, self.screen, plan))
        except DemoError:
            server.check(DYING_S)  # a dead server's log says more than a broken connection
            raise
        after = machine.probe_gflops()
        self.screen.phase("ending the server")
        alone, together = (taken(*p.cpu_times, p.end_s - p.start_s) for p in periods)
        ended = replace(conditions, taken=(alone, together), gflops=(conditions.gflops[0], after))
        return write_results(self.folder, self.seen, periods, ended)


async def _drive(
    server: Server, model: str, seen: Seen, screen: Screen, plan: DemoPlan
) -> tuple[Period, Period]:
    url = server.base_url
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # No request has a time limit of its own: the periods end, and what is under way with them.
    async with async_client_for(url, base_url=url, timeout=None, limits=limits) as http:
        client = DemoClient(http, model, seen, plan)
        prompts = chat_prompts(plan.seed, plan.excerpt_words)
        screen.phase("warming up")
        await client.warm_up(prompts)
        sampling = asyncio.create_task(client.sample())
        refreshing = asyncio.create_task(screen.keep_fresh(client.now_s))
        demo = _Periods(client, prompts, screen, plan)
        try:
            alone = await demo.alone()
            await asyncio.sleep(DRAIN_S)
            together = await demo.together()
        finally:
            for task in (sampling, refreshing):
                task.cancel()
            await asyncio.gather(sampling, refreshing, return_exceptions=True)
        await asyncio.sleep(DRAIN_S)
    return alone, together


@dataclass(frozen=True, slots=True)
class _Periods:
    client: DemoClient
    prompts: Iterator[str]
    screen: Screen
    plan: DemoPlan

    async def alone(self) -> Period:
        """Chat for its time; then what is not answered yet is waited for, with patience."""
        start_s, cpu_times = self._begin("chat alone", self.plan.alone_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.plan.alone_s + self.plan.patience_s):
                await self.client.chat(self.prompts, self._arrivals_s(start_s, 1))
        await asyncio.sleep(max(0.0, start_s + self.plan.alone_s - self.client.now_s()))
        return self._end("chat alone", start_s, cpu_times)

    async def together(self) -> Period:
        """Chat until the last document is summarised, or the time is over."""
        plan = self.plan
        start_s, cpu_times = self._begin("chat, and summaries in its idle time", plan.together_s)
        times = self._arrivals_s(start_s, int(plan.together_s // plan.alone_s) + 1)
        in_time = itertools.takewhile(lambda t: t < start_s + plan.together_s, times)
        chatting = asyncio.create_task(self.client.chat(self.prompts, list(in_time)))
        pages = documents(plan.num_documents, plan.page_words)
        summarising = asyncio.create_task(self.client.summarise(pages))
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(summarising, plan.together_s)
            return self._end("chat + summaries", start_s, cpu_times)
        finally:
            for task in (chatting, summarising):
                task.cancel()
            await asyncio.gather(chatting, summarising, return_exceptions=True)

    def _arrivals_s(self, start_s: float, num_spans: int) -> list[float]:
        spans = (start_s + k * self.plan.alone_s for k in range(num_spans))
        return [span_s + t for span_s in spans for t in self.plan.arrivals_s()]

    def _begin(self, name: str, most_s: float) -> tuple[float, CpuTimes | None]:
        start_s = self.client.now_s()
        self.screen.phase(name, start_s, start_s + most_s)
        return start_s, read_cpu_times()

    def _end(self, name: str, start_s: float, cpu_times: CpuTimes | None) -> Period:
        return Period(name, start_s, self.client.now_s(), (cpu_times, read_cpu_times()))
