"""Flex requests that wait too long, or that are too many: as OpenAI answers them, and its client
takes it. Around vLLM's own route decorators, its own answers to errors and its own states of
requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI, HTTPException, Request
from prometheus_client import REGISTRY
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm import SamplingParams
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from conserve.engine.batch_line import running_line
from conserve.server.tiers.middleware import ServiceTierMiddleware
from tests.server.engine_requests import engine_request

pytestmark = [pytest.mark.anyio, pytest.mark.engine]

SOON = {"x-flex-wait-s": "0.001"}
LATER_S = 0.02
"""After SOON: of two timers of one loop, the earlier goes off first however slow the machine is."""
LINE = f"batch_{0:032x}-0"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Engine:
    """vLLM's client as far as a request sees it: requests wait until their first token is let go,
    and end when they are told to."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.vllm_config = SimpleNamespace(additional_config={"conserve": settings})
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.num_here = 0
        self.first_token = asyncio.Event()
        self.end = asyncio.Event()
        self.compute_s = 0.0
        """Between the first token and the last, at least."""
        self.aborted: list[str] = []

    async def generate(self, request_id: str, **_: Any) -> AsyncIterator[str]:
        params = SamplingParams(max_tokens=2, output_kind=RequestOutputKind.FINAL_ONLY)
        params.detokenize = False
        request = engine_request(request_id, [1, 2], params)
        queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, request_id)
        self.output_processor.add_request(request, None, None, 0, queue)
        self.num_here += 1
        try:
            await self.first_token.wait()
            self.output_processor.process_outputs([EngineCoreOutput(request_id, [7])])
            yield "first"
            await asyncio.sleep(self.compute_s)
            await self.end.wait()
            yield "last"
        except asyncio.CancelledError:
            self.output_processor.abort_requests([request_id], internal=True)
            self.aborted.append(request_id)
            raise


class Served:
    """An application with vLLM's way of streaming and of not, and OpenAI's client of it."""

    def __init__(self, **settings: Any) -> None:
        self.engine = Engine(settings)
        self.app = app = FastAPI()
        app.state.engine_client = self.engine
        app.state.args = SimpleNamespace(log_error_stack=False)
        app.exception_handler(HTTPException)(http_exception_handler)
        app.post("/v1/chat/completions", response_model=None)(with_cancellation(self._create))
        app.add_middleware(ServiceTierMiddleware)
        http: Any = in_process(app)
        self.client = openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="-", http_client=http, max_retries=0
        )

    async def _create(self, body: dict[str, Any], raw_request: Request) -> Response:
        tokens = self.engine.generate(f"r{self.engine.num_here}", priority=body["priority"])
        if body.get("stream"):
            return StreamingResponse(self._events(tokens), media_type="text/event-stream")
        texts = [text async for text in tokens]
        return JSONResponse({**CHUNK, "choices": [choice(text) for text in texts]})

    async def _events(self, tokens: AsyncIterator[str]) -> AsyncIterator[str]:
        yield ": keep-alive\n\n"
        yield 'data: {"id":"a","choices":[]}\n\n'
        async for text in tokens:
            delta = {"index": 0, "delta": {"content": text}}
            yield f"data: {json.dumps({'id': 'a', 'choices': [delta]}, separators=(',', ':'))}\n\n"
        yield "data: [DONE]\n\n"

    async def ask(self, *, stream: bool = False, **options: Any) -> Any:
        options = {"service_tier": "flex", **options}
        return await self.client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], stream=stream, **options
        )

    async def here(self, number: int) -> None:
        while self.engine.num_here < number:  # noqa: ASYNC110  (no event says it)
            await asyncio.sleep(0)

    async def computing(self, number: int) -> None:
        """Until so many have their first token."""
        while self.num_computing() < number:  # noqa: ASYNC110  (no event says it)
            await asyncio.sleep(0)

    def num_computing(self) -> int:
        states = self.engine.output_processor.request_states.values()
        return sum(not one.is_prefilling for one in states)


def in_process(app: FastAPI) -> Any:
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None)


def refused_so_far(reason: str) -> float:
    """As /metrics says."""
    counted = REGISTRY.get_sample_value("conserve:flex_refused_total", {"reason": reason})
    assert counted is not None
    return counted


CHUNK = {"id": "a", "object": "chat.completion", "created": 0, "model": "m"}


def choice(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"index": 0, "finish_reason": "stop", "message": message}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by_header", [False, True])
async def test_who_waits_too_long_is_refused_before_anything_is_said(
    stream: bool, by_header: bool
) -> None:
    served = Served(**({} if by_header else {"flex_wait_s": 0.001}))
    with pytest.raises(openai.RateLimitError) as refused:
        await served.ask(stream=stream, extra_headers=SOON if by_header else {})
    error = refused.value
    assert (error.status_code, error.code) == (429, "resource_unavailable")
    assert error.type == "resource_unavailable"
    assert error.response.headers["retry-after"] == "1"
    assert "0.001 s" in error.message
    assert "service_tier" in error.message


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_of_it_is_left_in_the_engine(stream: bool) -> None:
    """Whose time is over before it even comes there never does."""
    served, wait_s = Served(), 0.001
    while not served.engine.num_here:
        with pytest.raises(openai.RateLimitError):
            await served.ask(stream=stream, extra_headers={"x-flex-wait-s": str(wait_s)})
        wait_s *= 2
    while served.engine.output_processor.request_states:  # noqa: ASYNC110  (no event says it)
        await asyncio.sleep(0)
    assert served.engine.aborted == ["r0"]


@pytest.mark.parametrize("stream", [False, True])
async def test_who_has_a_first_token_is_served_to_the_end(stream: bool) -> None:
    """The bound passes while it computes: a response is never broken off."""
    served, wait_s = Served(), 0.001
    served.engine.first_token.set()
    served.engine.end.set()
    reply = None
    while reply is None:
        served.engine.compute_s = 2 * wait_s
        try:
            reply = await served.ask(stream=stream, extra_headers={"x-flex-wait-s": str(wait_s)})
        except openai.RateLimitError:  # its first token took longer than that
            wait_s *= 2
    if stream:
        texts = [chunk.choices[0].delta.content async for chunk in reply if chunk.choices]
    else:
        texts = [one.message.content for one in reply.choices]
    assert texts == ["first", "last"]


async def test_openais_client_tries_again_by_itself() -> None:
    """After the time it is told, until it finds room."""
    served, before = Served(flex_max_waiting=1), refused_so_far("full")
    first = asyncio.create_task(served.ask())
    await served.here(1)
    began_s = time.monotonic()
    served.client = served.client.with_options(max_retries=100)
    asked = asyncio.create_task(served.ask(extra_headers={"x-flex-wait-s": "1"}))
    while refused_so_far("full") == before:  # noqa: ASYNC110  (no event says it)
        await asyncio.sleep(0)
    served.engine.first_token.set()
    served.engine.end.set()
    for reply in (await first, await asked):
        assert reply.service_tier == "flex"
    assert time.monotonic() - began_s >= 1, "as Retry-After says"


async def test_the_operators_bound_stands_over_a_longer_wish() -> None:
    served, before = Served(flex_wait_s=0.001), refused_so_far("waited")
    with pytest.raises(openai.RateLimitError):
        await served.ask(extra_headers={"x-flex-wait-s": "3600"})
    assert refused_so_far("waited") == before + 1


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon", ""])
async def test_a_wait_that_is_none_is_refused_by_name(given: str) -> None:
    served = Served()
    with pytest.raises(openai.BadRequestError) as refused:
        await served.ask(extra_headers={"x-flex-wait-s": given})
    assert refused.value.param == "x-flex-wait-s"
    assert served.engine.num_here == 0


async def test_only_so_many_wait() -> None:
    """Those that have their first token wait no more, and make room."""
    served, before = Served(flex_max_waiting=2), refused_so_far("full")
    asked = [asyncio.create_task(served.ask()) for _ in range(2)]
    await served.here(2)
    with pytest.raises(openai.RateLimitError) as refused:
        await served.ask()
    assert refused.value.code == "resource_unavailable"
    assert refused.value.response.headers["retry-after"] == "10"
    assert refused_so_far("full") == before + 1
    served.engine.first_token.set()
    await served.computing(2)
    asked.append(asyncio.create_task(served.ask()))
    await served.here(3)
    served.engine.end.set()
    assert len(await asyncio.gather(*asked)) == 3


async def test_who_hangs_up_waits_no_more() -> None:
    served = Served(flex_max_waiting=1)
    asked = asyncio.create_task(served.ask())
    await served.here(1)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    served.engine.first_token.set()
    served.engine.end.set()
    assert (await served.ask()).service_tier == "flex"


async def test_online_requests_and_lines_of_batches_wait_as_long_as_they_must() -> None:
    served = Served(flex_wait_s=0.001, flex_max_waiting=1)

    async def line() -> Any:
        with running_line(LINE):
            return await served.ask()

    asked = [asyncio.create_task(line()) for _ in range(2)]
    asked += [asyncio.create_task(served.ask(service_tier="default")) for _ in range(2)]
    await served.here(4)
    loop = asyncio.get_running_loop()
    loop.call_later(LATER_S, served.engine.first_token.set)
    served.engine.end.set()
    tiers = [(await one).service_tier for one in asked]
    assert tiers == ["flex", "flex", "default", "default"]
    assert not served.engine.aborted
