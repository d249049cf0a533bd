"""The middleware against a small application that answers as vLLM does."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from conserve.server.tiers.middleware import ServiceTierMiddleware
from conserve.server.tiers.paths import VECTOR_PATHS

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def application() -> FastAPI:
    """Echoes what it was given, under vLLM's paths and shapes."""
    app = FastAPI()

    async def create(request: Request, body: dict[str, Any]) -> Response:
        header = request.headers.get("x-vllm-priority")
        if body.get("stream"):
            return StreamingResponse(events(body), media_type="text/event-stream")
        answer = {"id": "a", "seen": body, "header": header, "service_tier": None}
        answer |= {"usage": body["usage"]} if "usage" in body else {}
        return JSONResponse(answer, status_code=body.get("status", 200))

    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", *VECTOR_PATHS, "/x"):
        app.post(path, response_model=None)(create)
    app.add_middleware(ServiceTierMiddleware)
    return app


async def events(body: dict[str, Any]) -> AsyncIterator[str]:
    yield 'data: {"id":"a","delta":"say \\"data: {\\" and \\"service_tier\\":null"}\n\n'
    yield 'data: {"id":"a","service_tier":null}\n\n'
    yield ": keep-alive\n\n"
    if "usage" in body:
        yield f"data: {json.dumps({'usage': body['usage']}, separators=(',', ':'))}\n\n"
    yield f"data: {json.dumps({'error': body['priority']}, separators=(',', ':'))}\n\n"
    yield "data: [DONE]\n\n"


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(application())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_flex_reaches_vllm_as_a_priority_and_comes_back(
    client: httpx.AsyncClient, path: str
) -> None:
    reply = await client.post(path, json={"service_tier": "flex", "prompt": "Grüß dich \u2028"})
    assert reply.json() == {
        "id": "a",
        "seen": {"service_tier": "flex", "priority": 1, "prompt": "Grüß dich \u2028"},
        "header": None,
        "service_tier": "flex",
    }
    assert int(reply.headers["content-length"]) == len(reply.content)


BARE = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": None}
FULL = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}
COUNTED = {
    "prompt_tokens_details": {"cached_tokens": 2, "audio_tokens": None},
    "completion_tokens_details": {"reasoning_tokens": 1},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("tier", "usage", "told"),
    [("flex", BARE, FULL), ("flex", COUNTED, COUNTED), ("default", BARE, BARE)],
)
async def test_a_flex_answers_usage_has_every_count(
    client: httpx.AsyncClient, path: str, stream: bool, tier: str, usage: Any, told: Any
) -> None:
    body = {"service_tier": tier, "usage": usage, "stream": stream}
    reply = await client.post(path, json=body)
    answers = (
        [reply.text] if not stream else re.findall(r"^data: (\{.*)$", reply.text, re.MULTILINE)
    )
    (found,) = (each for each in map(json.loads, answers) if each.get("usage"))
    assert (found["usage"], found["service_tier"]) == (told, tier)


async def test_a_flex_answer_may_have_no_usage(client: httpx.AsyncClient) -> None:
    body = {"service_tier": "flex", "usage": None}
    assert (await client.post("/v1/completions", json=body)).json()["usage"] is None


async def test_a_plain_request_is_default(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/responses", json={})
    assert reply.json()["seen"] == {"service_tier": "default", "priority": 0}
    assert reply.json()["service_tier"] == "default"


async def test_the_priority_header_is_folded_into_the_body(client: httpx.AsyncClient) -> None:
    body = {"service_tier": "flex"}
    reply = await client.post("/v1/completions", json=body, headers={"X-Vllm-Priority": "0"})
    assert reply.json()["seen"]["priority"] == 1
    assert reply.json()["header"] is None


async def test_an_unknown_tier_is_400_in_the_error_envelope(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/chat/completions", json={"service_tier": "cheap"})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["type"], error["code"]) == (
        "service_tier",
        "BadRequestError",
        400,
    )
    assert "'cheap'" in error["message"]
    assert "flex" in error["message"]


async def test_a_stream_names_the_tier_in_each_chunk_and_nowhere_else(
    client: httpx.AsyncClient,
) -> None:
    body = {"stream": True, "service_tier": "flex", "priority": 9}
    reply = await client.post("/v1/chat/completions", json=body)
    first, second, *rest = reply.text.split("\n\n")
    assert json.loads(first.removeprefix("data: ")) == {
        "service_tier": "flex",
        "id": "a",
        "delta": 'say "data: {" and "service_tier":null',
    }
    assert json.loads(second.removeprefix("data: ")) == {"id": "a", "service_tier": "flex"}
    assert second.count("service_tier") == 1
    assert rest == [": keep-alive", 'data: {"error":9}', "data: [DONE]", ""]


@pytest.mark.parametrize("raw", [b"not json", b"[1]", b"", b'{"priority": "x"}', b"\xff{}"])
async def test_a_body_we_cannot_read_passes_as_it_came(raw: bytes) -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        seen.append((message["body"], message["more_body"]))

    await ServiceTierMiddleware(app)(completions(), one_message(raw), nothing)
    assert seen == [(raw, False)]


@pytest.mark.parametrize("raw", [b'{ "messages" : [1.50] }', b'{"x":"\\ud800"}'])
async def test_a_request_without_our_words_passes_byte_for_byte(raw: bytes) -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["body"])

    await ServiceTierMiddleware(app)(completions(), one_message(raw), nothing)
    assert seen == [raw]


async def test_text_that_is_no_unicode_survives_the_rewriting() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(json.loads((await receive())["body"]))

    raw = b'{"service_tier":"flex","prompt":"\\ud800"}'
    await ServiceTierMiddleware(app)(completions(), one_message(raw), nothing)
    assert seen[0]["prompt"] == "\ud800"


@pytest.mark.parametrize("path", sorted(VECTOR_PATHS))
async def test_vectors_and_scores_have_classes_and_answers_of_their_own(
    client: httpx.AsyncClient, path: str
) -> None:
    """vLLM's requests for them know `priority` alone, and its answers no tier."""
    reply = await client.post(path, json={"service_tier": "flex", "input": "x"})
    assert reply.json() == {
        "id": "a",
        "seen": {"input": "x", "priority": 1},
        "header": None,
        "service_tier": None,
    }
    assert (await client.post(path, json={"service_tier": "cheap"})).status_code == 400


async def test_other_paths_pass_untouched(client: httpx.AsyncClient) -> None:
    reply = await client.post("/x", json={"service_tier": "cheap"})
    assert reply.json()["seen"] == {"service_tier": "cheap"}


async def test_an_error_response_passes_untouched(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/completions", json={"service_tier": "flex", "status": 404})
    assert reply.status_code == 404
    assert reply.json()["service_tier"] is None


async def test_a_body_in_pieces_is_classified_whole() -> None:
    pieces = [b'{"service_', b'tier": "fl', b'ex"}']
    messages = [{"type": "http.request", "body": p, "more_body": p != pieces[-1]} for p in pieces]
    messages.append({"type": "http.disconnect"})
    seen = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive()])

    await ServiceTierMiddleware(app)(completions(), receive, nothing)
    assert json.loads(seen[0]["body"]) == {"service_tier": "flex", "priority": 1}
    assert seen[1] == {"type": "http.disconnect"}


async def test_a_root_path_does_not_hide_the_endpoint() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(json.loads((await receive())["body"]))

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/llm/v1/completions",
        "root_path": "/llm",
        "headers": [],
    }
    await ServiceTierMiddleware(app)(scope, one_message(b'{"service_tier":"flex"}'), nothing)
    assert seen[0]["priority"] == 1


def completions() -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}


def one_message(body: bytes) -> Any:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def nothing(message: Any) -> None:
    """A send that nobody listens to."""


class Engine:
    """Takes requests as vLLM's engine client does, and notes their priorities."""

    def __init__(self) -> None:
        self.priorities: list[int] = []

    async def generate(self, prompt: str, *, priority: int = 0) -> AsyncIterator[str]:
        self.priorities.append(priority)
        yield prompt


def beaming(engine: Engine) -> FastAPI:
    """Asks its engine for two beams, in tasks of their own, and without the priority; and then for
    two turns, the second one ahead, as vLLM's loop of tool calls does."""
    app = FastAPI()
    app.state.engine_client = engine

    async def ask() -> None:
        async for _ in engine.generate("beam"):
            pass

    @app.post("/v1/completions")
    async def create(body: dict[str, Any]) -> dict[str, Any]:
        await asyncio.gather(*(asyncio.create_task(ask()) for _ in range(2)))
        for turn in range(2):
            async for _ in engine.generate("turn", priority=body.get("priority", 0) - turn):
                pass
        return body

    app.add_middleware(ServiceTierMiddleware)
    return app


async def test_what_a_request_asks_of_the_engine_has_its_class() -> None:
    engine = Engine()
    transport = httpx.ASGITransport(beaming(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for body in ({"service_tier": "flex"}, {"prompt": "x"}, {"priority": 3}):
            await client.post("/v1/completions", json=body)
    assert engine.priorities == [1, 1, 1, 1, 0, 0, 0, -1, 3, 3, 3, 2]
