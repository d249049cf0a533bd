"""Both periods of the demo on fake servers of several speeds, in virtual time."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import pytest
from rich.console import Console

from conserve.bench.demo.client import DemoClient, Seen
from conserve.bench.demo.figures import Period, figures
from conserve.bench.demo.plan import DemoPlan, Wanted, plan_for
from conserve.bench.demo.run import _Periods
from conserve.bench.demo.screen import Screen
from conserve.bench.demo.texts import chat_prompts
from conserve.bench.scale import REFERENCE, Speed
from conserve.metrics import CUT_OFF

SLOW = Speed(84.0, 8.0, 36.0)
LAPTOP = Speed(500.0, 20.0, 73.0)
FAST = Speed(24_000.0, 200.0, 2_500.0)


@dataclass
class ChatServer:
    """Computes prompts one after the other, flex ones only while no other waits; every running
    answer makes the steps of all slower."""

    speed: Speed
    running: int = 0
    waiting: int = 0
    free_s: float = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        num_prompt_tokens = 55 + round(1.35 * len(body["messages"][0]["content"].split()))
        flex = body.get("service_tier") == "flex"
        await self._prefill(num_prompt_tokens, flex=flex)
        self.running += 1
        try:
            for n in range(1, body["max_tokens"] + 1):
                usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": n}
                message = {"choices": [{"delta": {"content": "x"}}], "usage": usage}
                data = f"data: {json.dumps(message)}\n\n".encode()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                await asyncio.sleep(self.speed.step_s(min(self.running, 16)))
        finally:
            self.running -= 1
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _prefill(self, num_tokens: int, *, flex: bool) -> None:
        self.waiting += not flex
        try:
            # Looking again costs nothing on a clock that jumps.
            while self.free_s > now_s() or (flex and self.waiting):  # noqa: ASYNC110
                await asyncio.sleep(max(self.free_s - now_s(), 0.01))
            self.free_s = now_s() + num_tokens / self.speed.prefill_tps
            await asyncio.sleep(self.free_s - now_s())
        finally:
            self.waiting -= not flex


def now_s() -> float:
    return asyncio.get_running_loop().time()


@pytest.fixture
def both_periods(in_virtual_time: Any, connect: Any) -> Any:
    """What was seen of a server in both periods of a plan, on a clock that jumps."""

    async def main(server: Any, plan: DemoPlan) -> tuple[Seen, Period, Period]:
        seen = Seen()
        async with connect(server) as http:
            client = DemoClient(http, "m", seen, plan)
            prompts = chat_prompts(plan.seed, plan.excerpt_words)
            screen = Screen(seen, Console(quiet=True))
            demo = _Periods(client, prompts, screen, plan)
            return seen, await demo.alone(), await demo.together()

    return lambda server, plan: in_virtual_time(main(server, plan))


@pytest.mark.parametrize("speed", [SLOW, LAPTOP, REFERENCE, FAST], ids=["1/20", "1/5", "1", "10"])
def test_nothing_fails_and_chat_alone_is_within_its_targets(
    both_periods: Any, speed: Speed
) -> None:
    plan = plan_for(speed, 280.0, Wanted())
    seen, alone, together = both_periods(ChatServer(speed), plan)
    chats = figures(seen, alone)
    assert (chats.num_chats, chats.num_chats_failed) == (plan.num_chats, 0)
    assert chats.ttft_p99_s < 0.7 * plan.ttft_target_s
    assert chats.tbt_p99_s < 0.7 * plan.tbt_target_s
    assert figures(seen, together).num_chats > 0
    assert len(seen.summaries) > plan.num_documents / 2
    assert {record.error for record in seen.records} <= {None, CUT_OFF}
    assert together.end_s < 300


def test_a_machine_that_gets_much_slower_still_ends(both_periods: Any) -> None:
    """Measured, then a hundred times as slow: what is not answered is cut off, and nothing else."""
    plan = plan_for(REFERENCE, 280.0, Wanted())
    crawling = Speed(*(0.01 * tps for tps in (2400.0, 65.0, 550.0)))
    seen, alone, together = both_periods(ChatServer(crawling), plan)
    assert alone.end_s <= plan.alone_s + plan.patience_s + 1
    assert together.end_s - together.start_s <= plan.together_s + 1
    cut_off = [record for record in seen.records if record.error == CUT_OFF]
    assert any(record.online and record.arrival_s < plan.alone_s for record in cut_off)
    assert {record.error for record in seen.records} <= {None, CUT_OFF}
