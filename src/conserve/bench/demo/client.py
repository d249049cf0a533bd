"""The demo's load: bursty chat in an open loop, and summaries kept in flight as flex requests."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from conserve.bench.demo.plan import DemoPlan
from conserve.bench.demo.texts import Document, summary_prompt
from conserve.bench.stream import STREAMED, messages, receive, refusal
from conserve.metrics import CUT_OFF, RequestRecord


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One document's summary; seconds are on the demo's clock."""

    document: str
    summary: str
    num_prompt_tokens: int
    num_output_tokens: int
    finished_s: float


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens the engine had computed for each class at one moment."""

    at_s: float
    online_tokens: float
    offline_tokens: float


@dataclass(slots=True)
class Seen:
    """What the demo has seen so far; the screen and the results read it."""

    records: list[RequestRecord] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


class DemoClient:
    """Sends the demo's requests to one server. Its clock starts when it is made."""

    def __init__(self, http: httpx.AsyncClient, model: str, seen: Seen, plan: DemoPlan) -> None:
        self._http = http
        self._model = model
        self._seen = seen
        self._plan = plan
        self._zero_s = asyncio.get_running_loop().time()

    def now_s(self) -> float:
        return asyncio.get_running_loop().time() - self._zero_s

    async def chat(self, prompts: Iterator[str], arrivals_s: Sequence[float]) -> None:
        """Ask one question at each moment, whatever became of the earlier ones."""
        async with asyncio.TaskGroup() as asked:
            for when_s in arrivals_s:
                await asyncio.sleep(max(0.0, when_s - self.now_s()))
                asked.create_task(self._question(next(prompts), when_s))

    async def summarise(self, documents: Sequence[Document]) -> None:
        """Summarise every document, `in_flight` at a time. Raises DemoError if one fails."""
        waiting = deque(documents)

        async def place() -> None:
            while waiting:
                await self._summary(waiting.popleft())

        await asyncio.gather(*(place() for _ in range(self._plan.in_flight)))

    async def sample(self) -> None:
        """Read the engine's counters every `sample_s` until cancelled."""
        while True:
            with suppress(httpx.HTTPError):
                await self.sample_once()
            await asyncio.sleep(self._plan.sample_s)

    async def sample_once(self) -> None:
        text = (await self._http.get("/metrics")).text
        self._seen.samples.append(_sample(self.now_s(), text))

    async def warm_up(self, prompts: Iterator[str]) -> None:
        """A few requests of both classes that nothing counts. Raises DemoError if one fails."""
        for fields in ({}, {"service_tier": "flex"}):
            record = RequestRecord("warm-up", online=not fields, arrival_s=self.now_s())
            await self._ask(record, next(prompts), 8, fields)
            if record.error:
                raise DemoError(f"the server does not answer as it should: {record.error}")

    async def _question(self, prompt: str, arrival_s: float) -> None:
        record = RequestRecord(f"chat-{len(self._seen.records)}", online=True, arrival_s=arrival_s)
        self._seen.records.append(record)
        await self._ask(record, prompt, self._plan.chat_tokens, {})

    async def _summary(self, document: Document) -> None:
        record = RequestRecord(document.name, online=False, arrival_s=self.now_s())
        self._seen.records.append(record)
        text = await self._ask(
            record,
            summary_prompt(document),
            self._plan.summary_tokens,
            {"service_tier": "flex"},
        )
        if record.error:
            raise DemoError(f"the summary of {document.name!r} failed: {record.error}")
        tokens = record.num_prompt_tokens, record.num_output_tokens
        self._seen.summaries.append(Summary(document.name, text.strip(), *tokens, self.now_s()))

    async def _ask(
        self, record: RequestRecord, prompt: str, max_tokens: int, fields: dict[str, Any]
    ) -> str:
        """Stream one answer into `record`; returns its text."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            **STREAMED,
            **fields,
        }
        parts: list[str] = []
        record.error = CUT_OFF
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if refused := await refusal(response):
                    record.error = refused
                    return ""
                parts = [self._receive(m, record) async for m in messages(response) if m]
            record.error = None
        except httpx.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}"
        return "".join(parts)

    def _receive(self, message: dict[str, Any], record: RequestRecord) -> str:
        """Count the tokens of a message; returns its text. Raises httpx.HTTPError."""
        if "error" in message:
            raise httpx.RemoteProtocolError(str(message["error"]))
        receive(message, record, self.now_s())
        choices = message.get("choices") or []
        return (choices[0]["delta"].get("content") or "") if choices else ""


def _sample(at_s: float, text: str) -> Sample:
    """The engine's token counters out of a /metrics page; 0 before the first step."""
    tokens = {"online": 0.0, "offline": 0.0}
    for line in text.splitlines():
        if line.startswith("conserve:computed_tokens_total"):
            name = "offline" if 'class="offline"' in line else "online"
            tokens[name] += float(line.rsplit(" ", 1)[1])
    return Sample(at_s, tokens["online"], tokens["offline"])
