"""A small model server, a clock, and a running service for the tests of this room."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from conserve.batch.executor import asgi_executor
from conserve.batch.service import BatchService
from conserve.batch.settings import BatchSettings
from conserve.server.batches.routes import batch_service
from tests.batch.builders import CHAT, MODEL, batch_body

MAX_MODEL_LEN = 4096
POLL_S = 0.05
PATIENCE_S = 60.0


@dataclass
class FakeClock:
    now_s: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass
class FakeModel:
    """Answers a prompt with itself reversed; a prompt `fail:STATUS:TIMES:...` fails so often first.

    `open` holds every answer back while it is cleared.
    """

    api_keys: Sequence[str] = ()
    name: str = MODEL
    seen: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    open: asyncio.Event = field(default_factory=asyncio.Event)
    app: FastAPI = field(default_factory=FastAPI)

    def __post_init__(self) -> None:
        self.open.set()
        self.app.get("/v1/models")(self.models)
        self.app.post(CHAT)(self.chat)
        for url in ("/v1/embeddings", "/v1/score", "/v1/rerank"):
            self.app.post(url)(self.embed)
        if self.api_keys:
            self.app.middleware("http")(self.guard)

    async def guard(self, request: Request, call_next: Callable[[Request], Any]) -> Any:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key not in self.api_keys:
            return JSONResponse({"error": {"message": "Unauthorized"}}, status_code=401)
        return await call_next(request)

    async def models(self) -> dict[str, Any]:
        card = {"id": self.name, "object": "model", "max_model_len": MAX_MODEL_LEN}
        return {"object": "list", "data": [card]}

    async def embed(self, request: Request) -> dict[str, Any]:
        await request.json()
        usage = {"prompt_tokens": 5, "total_tokens": 5}
        return {"object": "list", "data": [{"embedding": [0.5]}], "usage": usage}

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        prompt = body["messages"][-1]["content"]
        self.bodies.append(body)
        self.seen[prompt] += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.open.wait()
        finally:
            self.running -= 1
        word, _, rest = prompt.partition(":")
        if word == "fail":
            status, times = rest.split(":")[:2]
            if self.seen[prompt] <= int(times):
                error = {"message": "no", "type": "BadRequestError", "param": None, "code": None}
                return JSONResponse({"error": error}, status_code=int(status))
        return JSONResponse(answer(prompt))


def answer(prompt: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": prompt[::-1]},
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


@dataclass
class Running:
    service: BatchService
    model: FakeModel
    client: openai.AsyncOpenAI
    http: httpx.AsyncClient

    def client_of(self, key: str) -> openai.AsyncOpenAI:
        return self.client.with_options(api_key=key)

    async def upload(self, content: bytes, client: openai.AsyncOpenAI | None = None) -> str:
        made = await (client or self.client).files.create(
            file=("input.jsonl", content), purpose="batch"
        )
        return made.id

    async def submit(self, content: bytes, **extra: Any) -> Any:
        """A batch over chat completions; `extra` goes to the body as extensions do."""
        body = batch_body(await self.upload(content))
        return await self.client.batches.create(**body, extra_body=extra or None)

    async def until(self, batch_id: str, *statuses: str) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                batch = await self.client.batches.retrieve(batch_id)
                if batch.status in statuses:
                    return batch
                await asyncio.sleep(POLL_S)

    async def lines_of(self, file_id: str | None) -> dict[str, dict[str, Any]]:
        """Lines of an output or error file by custom_id; none for no file, no id twice."""
        if file_id is None:
            return {}
        lines = [
            json.loads(text) for text in (await self.client.files.content(file_id)).iter_lines()
        ]
        by_id = {each["custom_id"]: each for each in lines}
        assert len(by_id) == len(lines)
        return by_id


@asynccontextmanager
async def running(
    settings: BatchSettings,
    model: FakeModel | None = None,
    clock: Callable[[], float] | None = None,
) -> AsyncIterator[Running]:
    model = model or FakeModel()
    key = model.api_keys[0] if model.api_keys else "any"
    executor = asgi_executor(model.app, api_key=key)
    transport = httpx.ASGITransport(model.app)
    http = httpx.AsyncClient(
        transport=transport,
        base_url="http://test",
        timeout=PATIENCE_S,
        headers={"authorization": f"Bearer {key}"},
    )
    legacy: Any = http  # the client takes it, though its types name httpx2's alone
    client = openai.AsyncOpenAI(
        api_key=key, base_url="http://test/v1", http_client=legacy, max_retries=0
    )
    extra = {"clock": clock} if clock else {}
    async with http, batch_service(settings, model.app, executor, **extra) as service:
        yield Running(service, model, client, http)
    await executor.close()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  (any condition, not an event)
            await asyncio.sleep(POLL_S)
