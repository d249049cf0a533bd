"""The load: an open loop of online requests beside a closed loop of offline ones, over HTTP.

Time is the event loop's clock, so a test can drive it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from conserve.bench.stream import STREAMED, Transcript, messages, receive, refusal
from conserve.metrics import CUT_OFF, UNFINISHED, RequestRecord
from conserve.workload import RequestPlan, Window, Workload

Body = Callable[[RequestPlan], dict[str, Any]]
"""The JSON body of a request; what the client adds is how it is streamed and, to the prompt of a
later turn of a conversation, what was said before."""

Counters = Callable[[], Awaitable[Mapping[str, float]]]
"""Counters that are not on the server's /metrics, as they stand."""

AFTER_FAILURE_S = 1.0
"""Pause of an offline place whose request failed, so that a dead server is not hammered."""

BUCKETS = (
    "conserve:first_token_part_seconds",
    "conserve:stop_response_seconds",
    "conserve:stop_response_layers",
)
COUNTERS = (
    "conserve:",
    "vllm:num_preemptions",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:prefix_cache",
)


@dataclass(slots=True)
class Load:
    """What one run saw. Counters are the server's /metrics at the window's two ends."""

    records: list[RequestRecord] = field(default_factory=list)
    counters_start: dict[str, float] = field(default_factory=dict)
    counters_end: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Later:
    """The turns that wait for an answer; none is sent at `end_s` or after it."""

    next_turns: Mapping[str, RequestPlan]
    end_s: float

    def turn_after(self, record: RequestRecord) -> tuple[RequestPlan, float] | None:
        """The next turn and when it is sent; None where the conversation is over or has failed."""
        plan = self.next_turns.get(record.request_id)
        if plan is None or not record.finished:
            return None
        arrival_s = record.token_times_s[-1] + plan.pause_s
        return (plan, arrival_s) if arrival_s < self.end_s else None


class LoadClient:
    """Sends one run's requests to one server. Use within the event loop that made `http`."""

    def __init__(
        self, http: httpx.AsyncClient, body: Body, other_counters: Counters | None = None
    ) -> None:
        self._http = http
        self._body = body
        self._other_counters = other_counters
        self._zero_s = 0.0

    async def run(self, workload: Workload, window: Window, load: Load) -> None:
        """Fill `load`; on cancellation what was seen so far is in it."""
        self._zero_s = asyncio.get_running_loop().time() + window.lead_in_s
        plans = iter(workload.offline)
        offline = [
            asyncio.create_task(self._keep_busy(plans, load)) for _ in range(workload.in_flight)
        ]
        start = asyncio.create_task(self._scrape_at(0.0, load.counters_start))
        end = asyncio.create_task(self._scrape_at(window.duration_s, load.counters_end))
        later = Later(workload.next_turns, window.duration_s)
        online = [asyncio.create_task(self._arrive(plan, later, load)) for plan in workload.online]
        everything = [*offline, *online, start, end]
        try:
            await self._sleep_until(window.duration_s)
            if online:
                await asyncio.wait(online, timeout=window.drain_s)
            await asyncio.gather(start, end)
        finally:
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)

    async def ask(self, plans: list[RequestPlan]) -> list[RequestRecord]:
        """Send `plans` at once and wait for them. Raises RuntimeError if one fails."""
        records = await asyncio.gather(*(self._send(p, self._now_s(), Load()) for p in plans))
        if bad := [record.error for record in records if record.error]:
            raise RuntimeError(f"{len(bad)} of {len(plans)} requests failed: {bad[0]}")
        return records

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time() - self._zero_s

    async def _sleep_until(self, when_s: float) -> None:
        await asyncio.sleep(max(when_s - self._now_s(), 0.0))

    async def _arrive(self, plan: RequestPlan, later: Later, load: Load) -> None:
        """One request, and the turns that come of it."""
        said = Transcript() if plan.session else None
        arrival_s, turn = plan.arrival_s, plan
        while True:
            await self._sleep_until(arrival_s)
            # From the planned arrival: a late client is slow service too, not a later arrival.
            record = await self._send(turn, arrival_s, load, said)
            following = later.turn_after(record)
            if following is None:
                return
            turn, arrival_s = following

    async def _keep_busy(self, plans: Iterator[RequestPlan], load: Load) -> None:
        """One place of the offline load: the next request as soon as one has ended."""
        for plan in plans:
            record = await self._send(plan, self._now_s(), load)
            if record.failed:
                await asyncio.sleep(AFTER_FAILURE_S)

    async def _send(
        self, plan: RequestPlan, arrival_s: float, load: Load, said: Transcript | None = None
    ) -> RequestRecord:
        record = RequestRecord(plan.request_id, plan.online, arrival_s)
        record.num_prompt_tokens = plan.num_prompt_tokens
        # Kept from the start, so that it is there however this ends.
        load.records.append(record)
        record.error = CUT_OFF
        try:
            record.error = await self._stream(plan, record, said)
        except httpx.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}"
        except asyncio.CancelledError:
            if plan.online:
                record.error = UNFINISHED
            raise
        return record

    async def _stream(
        self, plan: RequestPlan, record: RequestRecord, said: Transcript | None
    ) -> str | None:
        """Receive the tokens of one request into `record`; returns what went wrong, or None."""
        body = {**self._body(plan), **STREAMED}
        if said is not None:
            body = said.asked(body)
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if refused := await refusal(response):
                return refused
            async for message in messages(response):
                if message is None:
                    return _mismatch(plan, record)
                if "error" in message:
                    return f"in the stream: {message['error']}"
                receive(message, record, self._now_s())
                if said is not None:
                    said.answered(message)
        return f"the stream broke off after {record.num_output_tokens} tokens"

    async def _scrape_at(self, when_s: float, into: dict[str, float]) -> None:
        await self._sleep_until(when_s)
        with suppress(httpx.HTTPError):
            response = await self._http.get("/metrics")
            if response.status_code == 200:
                into.update(_counters(response.text))
            if self._other_counters is not None:
                into.update(await self._other_counters())


def _mismatch(plan: RequestPlan, record: RequestRecord) -> str | None:
    wanted = (plan.num_prompt_tokens, plan.num_output_tokens)
    got = (record.num_prompt_tokens, record.num_output_tokens)
    return None if got == wanted else f"{got} prompt and output tokens, not {wanted}"


def _counters(text: str) -> dict[str, float]:
    """Samples of the series we report, by name and labels; of the histograms only those whose
    percentiles the client cannot see have their buckets kept."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(COUNTERS):
            continue
        for sample in family.samples:
            bucket = sample.name.endswith("_bucket") and family.name not in BUCKETS
            if bucket or sample.name.endswith("_created"):
                continue
            skipped = ("engine", "model_name")
            labels = ",".join(f"{k}={v}" for k, v in sample.labels.items() if k not in skipped)
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = float(sample.value)
    return found
