"""Usage of online and flex requests: vLLM's own route decorators, its own output processor and its
own states of requests, real stores, and the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("vllm")

import torch
from fastapi import FastAPI, HTTPException, Request
from prometheus_client import REGISTRY
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm import SamplingParams
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import PrefillStats

from conserve.batch.errors import StoreUnavailableError
from conserve.batch.ids import tenant_of
from conserve.batch.usage_store import Counts
from conserve.engine.batch_line import running_line
from conserve.server.batches.middleware import BatchesMiddleware
from conserve.server.tiers.middleware import ServiceTierMiddleware
from conserve.server.usage import bill
from conserve.server.usage.middleware import UsageMiddleware
from tests.server.engine_requests import engine_request
from tests.server.vllms_app import engine_config, started

pytestmark = [pytest.mark.anyio, pytest.mark.engine]

CHAT = "/v1/chat/completions"
PROMPT = [1, 2, 3, 4, 5]
NUM_CACHED = 2
NUM_OUTPUT = 3
LINE = f"batch_{0:032x}-0"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONSERVE_BATCH_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(bill, "EVERY_S", 0.01)


class Engine:
    """vLLM's client as far as a request sees it. Each token waits until it may be computed."""

    errored = False

    def __init__(self) -> None:
        self.vllm_config = engine_config()
        self.vllm_config.additional_config = {"conserve": {}}
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.num_asked = 0
        self.may_begin, self.may_end = asyncio.Event(), asyncio.Event()
        self.may_begin.set()
        self.may_end.set()

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing runs."""

    async def generate(self, n: int = 1, priority: int = 0, lora: str | None = None) -> Any:
        """Answers to one prompt; aborted together, as vLLM does when the client goes."""
        params = SamplingParams(max_tokens=NUM_OUTPUT, n=n, output_kind=RequestOutputKind.DELTA)
        params.detokenize = False
        self.num_asked += 1
        request = engine_request(f"r{self.num_asked}", PROMPT, params, priority=priority, lora=lora)
        parent = ParentRequest(request) if n > 1 else None
        children = [parent.get_child_info(index) for index in range(n)] if parent else []
        children = children or [(request.request_id, params)]
        names = [name for name, _ in children]
        for index, (name, its_params) in enumerate(children):
            asked = engine_request(name, PROMPT, its_params, priority=priority, lora=lora)
            self._add(asked, parent, index)
        try:
            await self.may_begin.wait()
            self._output(names, PrefillStats(num_cached_tokens=NUM_CACHED))
            yield "first"
            await self.may_end.wait()
            for last in (False, True):
                self._output(names, None, FinishReason.LENGTH if last else None)
            yield "last"
        finally:
            self.output_processor.abort_requests(names, internal=True)

    async def encode(self, priority: int = 0) -> None:
        self.num_asked += 1
        name = f"r{self.num_asked}"
        asked = engine_request(name, PROMPT, None, pooling=PoolingParams(), priority=priority)
        self._add(asked, None, 0)
        await self.may_end.wait()
        stats = PrefillStats(num_cached_tokens=0)
        output = EngineCoreOutput(
            name,
            [],
            pooling_output=torch.zeros(1),
            finish_reason=FinishReason.STOP,
            prefill_stats=stats,
        )
        self.output_processor.process_outputs([output])

    def _add(self, request: EngineCoreRequest, parent: ParentRequest | None, index: int) -> None:
        queue = RequestOutputCollector(RequestOutputKind.DELTA, request.request_id)
        self.output_processor.add_request(request, None, parent, index, queue)

    def _output(
        self, names: list[str], stats: PrefillStats | None, reason: FinishReason | None = None
    ) -> None:
        self.output_processor.process_outputs(
            [
                EngineCoreOutput(name, [7], finish_reason=reason, prefill_stats=stats)
                for name in names
            ]
        )


class Served:
    """An application with vLLM's way of streaming and of not, and OpenAI's client of it."""

    def __init__(self, keys: list[str] | None = None) -> None:
        self.engine = Engine()
        self.app = app = FastAPI()
        app.state.engine_client = self.engine
        app.state.args = SimpleNamespace(
            log_error_stack=False, served_model_name=["m", "alias"], model="org/m", api_key=keys
        )
        app.exception_handler(HTTPException)(http_exception_handler)
        app.post(CHAT, response_model=None)(with_cancellation(self._chat))
        app.post("/v1/embeddings", response_model=None)(with_cancellation(self._embed))
        for middleware in (ServiceTierMiddleware, UsageMiddleware, BatchesMiddleware):
            app.add_middleware(middleware)
        transport = httpx.ASGITransport(app)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None)
        legacy: Any = self.http
        self.client = openai.AsyncOpenAI(
            base_url="http://test/v1",
            api_key=keys[0] if keys else "-",
            http_client=legacy,
            max_retries=0,
        )
        self.background: set[asyncio.Task[Any]] = set()
        self.may_ask = asyncio.Event()

    async def _chat(self, body: dict[str, Any], raw_request: Request) -> Response:
        if body["model"] == "unknown":
            return JSONResponse({"error": {"message": "no such model"}}, status_code=404)
        lora = body["model"] if body["model"].startswith("adapter") else None
        tokens = self.engine.generate(
            n=body.get("n", 1), priority=body.get("priority", 0), lora=lora
        )
        if body.get("stream"):
            return StreamingResponse(
                self._events(body["model"], tokens), media_type="text/event-stream"
            )
        if body.get("background"):
            task = asyncio.create_task(self._in_background(body, tokens))
            self.background.add(task)
            return JSONResponse(CHUNK)
        await drained(tokens)
        if body["model"] == "breaks":
            return JSONResponse({"error": {"message": "broken"}}, status_code=500)
        if body["model"] == "stops":
            return JSONResponse(CHUNK | {"choices": [STOPPED]})
        return JSONResponse(CHUNK)

    async def _in_background(self, body: dict[str, Any], tokens: AsyncIterator[str]) -> None:
        if body.get("late"):
            await self.may_ask.wait()
        await drained(tokens)
        if body.get("again"):
            await self.may_ask.wait()
            await drained(self.engine.generate())

    async def _events(self, model: str, tokens: AsyncIterator[str]) -> AsyncIterator[str]:
        async for text in tokens:
            if model == "breaks" and text == "last":
                yield 'data: {"error": {"message": "broken"}}\n\n'
                break
            reason = "abort" if model == "stops" and text == "last" else None
            delta = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
            yield f"data: {json.dumps({'id': 'a', 'choices': [delta]}, separators=(',', ':'))}\n\n"
        yield "data: [DONE]\n\n"

    async def _embed(self, body: dict[str, Any], raw_request: Request) -> Response:
        await asyncio.gather(*(self.engine.encode() for _ in body["input"]))
        return JSONResponse({"object": "list", "model": "m", "data": [], "usage": {}})

    async def ask(self, model: str = "m", *, stream: bool = False, **options: Any) -> Any:
        """To its end."""
        asked = await self.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "x"}], stream=stream, **options
        )
        if isinstance(asked, openai.AsyncStream):
            return [chunk async for chunk in asked]
        return asked

    async def usage(self) -> dict[tuple[str, str], Counts]:
        """By class and model, all days together."""
        found: dict[tuple[str, str], Counts] = {}
        days = (await self.client.get("/usage", cast_to=httpx.Response)).json()["data"]
        for day in days:
            used = day["usage"]
            counts = Counts(
                day["completed"],
                day["failed"],
                used["input_tokens"],
                used["input_tokens_details"]["cached_tokens"],
                used["output_tokens"],
            )
            name = day["request_class"], day["model"]
            found[name] = found.get(name, Counts()) + counts
        return found

    async def until(self, condition: Callable[[dict[tuple[str, str], Counts]], bool]) -> Any:
        while not condition(found := await self.usage()):  # noqa: ASYNC110  (no event says it)
            await asyncio.sleep(0.01)
        return found


CHUNK = {"id": "a", "object": "chat.completion", "created": 0, "model": "m", "choices": []}
STOPPED = {
    "index": 0,
    "message": {"role": "assistant", "content": "first"},
    "finish_reason": "abort",
}
WHOLE = Counts(1, 0, len(PROMPT), NUM_CACHED, NUM_OUTPUT)


async def drained(tokens: AsyncIterator[str]) -> None:
    async for _ in tokens:
        pass


@asynccontextmanager
async def serving(keys: list[str] | None = None) -> AsyncIterator[Served]:
    served = Served(keys)
    async with served.http, started(served.app):
        yield served


def ended(number: int) -> Callable[[dict[tuple[str, str], Counts]], bool]:
    return lambda found: sum(one.completed + one.failed for one in found.values()) == number


async def test_streamed_or_not_and_by_class_whether_usage_was_asked_for_or_not() -> None:
    async with serving() as served:
        await served.ask()
        await served.ask(stream=True)
        await served.ask(stream=True, service_tier="flex")
        await served.ask(extra_body={"priority": 3})
        assert await served.until(ended(4)) == {
            ("online", "m"): WHOLE + WHOLE,
            ("flex", "m"): WHOLE + WHOLE,
        }


async def test_an_adapter_is_a_model_of_its_own_and_an_alias_is_not() -> None:
    async with serving() as served:
        for model in ("adapter-1", "alias"):
            await served.ask(model)
        assert await served.until(ended(2)) == {
            ("online", "adapter-1"): WHOLE,
            ("online", "m"): WHOLE,
        }


async def test_many_answers_to_one_prompt_have_one_prompt() -> None:
    async with serving() as served:
        await served.ask(n=4)
        found = await served.until(ended(1))
    assert found["online", "m"] == Counts(1, 0, len(PROMPT), NUM_CACHED, 4 * NUM_OUTPUT)


async def test_vectors_count_their_prompts() -> None:
    async with serving() as served:
        await served.client.embeddings.create(model="m", input=["a", "b"], encoding_format="float")
        found = await served.until(ended(1))
    assert found["online", "m"] == Counts(1, 0, 2 * len(PROMPT), 0, 0)


async def test_what_is_refused_counts_nothing_and_what_fails_its_tokens() -> None:
    async with serving() as served:
        with pytest.raises(openai.NotFoundError):
            await served.ask("unknown")
        with pytest.raises(openai.InternalServerError):
            await served.ask("breaks")
        found = await served.until(ended(1))
    assert found["online", "m"] == Counts(0, 1, len(PROMPT), NUM_CACHED, NUM_OUTPUT)


async def test_a_stream_that_ends_in_an_error_is_no_whole_answer() -> None:
    """Its status is 200: it was sent before anything went wrong."""
    async with serving() as served:
        with pytest.raises(openai.APIError, match="broken"):
            await served.ask("breaks", stream=True)
        found = await served.until(ended(1))
    assert found["online", "m"] == Counts(0, 1, len(PROMPT), NUM_CACHED, NUM_OUTPUT)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_was_told_to_abort_is_no_whole_answer(*, stream: bool) -> None:
    async with serving() as served:
        await served.ask("stops", stream=stream)
        found = await served.until(ended(1))
    assert found["online", "m"] == Counts(0, 1, len(PROMPT), NUM_CACHED, NUM_OUTPUT)


@pytest.mark.parametrize("has_begun", [False, True])
async def test_who_hangs_up_pays_what_was_computed(*, has_begun: bool) -> None:
    async with serving() as served:
        served.engine.may_end.clear()
        if not has_begun:
            served.engine.may_begin.clear()
        asked = asyncio.create_task(served.ask(stream=True))
        states = served.engine.output_processor.request_states
        while not any(  # noqa: ASYNC110  (no event says it)
            one.is_prefilling is not has_begun for one in states.values()
        ):
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        found = await served.until(ended(1))
    tokens = (len(PROMPT), NUM_CACHED, 1) if has_begun else (0, 0, 0)
    assert found["online", "m"] == Counts(0, 1, *tokens)


async def test_a_long_answer_is_counted_as_it_grows() -> None:
    """What a crash loses is what came since it was saved last."""
    async with serving() as served:
        served.engine.may_end.clear()
        asked = asyncio.create_task(served.ask(stream=True))
        found = await served.until(lambda found: bool(found))
        assert found["online", "m"] == Counts(0, 0, len(PROMPT), NUM_CACHED, 1)
        served.engine.may_end.set()
        await asked
        assert await served.until(ended(1)) == {("online", "m"): WHOLE}


async def test_what_goes_on_after_its_answer_is_counted_too() -> None:
    """As a response does in the background."""
    async with serving() as served:
        served.engine.may_begin.clear()
        await served.ask(extra_body={"background": True})
        await served.until(ended(1))
        served.engine.may_begin.set()
        await asyncio.gather(*served.background)
        await served.until(lambda found: found["online", "m"] == WHOLE)


@pytest.mark.parametrize("asks", ["late", "again"])
async def test_what_asks_after_its_answer_is_counted_too(asks: str) -> None:
    """As a response does in the background: once its tools are there, and after each turn."""
    async with serving() as served:
        served.may_ask.clear()
        await served.ask(extra_body={"background": True, asks: True})
        if asks == "again":
            await served.until(lambda found: found.get(("online", "m")) == WHOLE)
        served.may_ask.set()
        await asyncio.gather(*served.background)
        turns = 2 if asks == "again" else 1
        tokens = [turns * each for each in (len(PROMPT), NUM_CACHED, NUM_OUTPUT)]
        whole = Counts(1, 0, *tokens)
        await served.until(lambda found: found.get(("online", "m")) == whole)


async def test_lines_of_batches_are_left_to_the_batches() -> None:
    async with serving() as served:
        with running_line(LINE):
            await served.ask(service_tier="flex")
        await served.ask()
        assert await served.until(ended(1)) == {("online", "m"): WHOLE}


async def test_a_key_sees_its_own() -> None:
    async with serving(["mine", "theirs"]) as served:
        await served.ask()
        await served.until(ended(1))
        served.client = served.client.with_options(api_key="theirs")
        assert await served.usage() == {}
        await served.ask(service_tier="flex")
        assert await served.until(ended(1)) == {("flex", "m"): WHOLE}
        stores = served.app.state.batch_service.stores
        owners = {day.billed.tenant for day in await stores.usage.days(0, 10**6)}
        assert owners == {tenant_of(f"Bearer {key}") for key in ("mine", "theirs")}


async def test_the_end_of_the_server_saves_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bill, "EVERY_S", 3600.0)
    async with serving() as served:
        await served.ask()
        assert await served.usage() == {}
    async with serving() as served:
        assert await served.usage() == {("online", "m"): WHOLE}


async def test_no_request_waits_for_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as served:
        stores = served.app.state.batch_service.stores
        put, is_away = stores.usage.put, True

        async def away(*arguments: Any) -> None:
            if is_away:
                raise StoreUnavailableError("away")
            await put(*arguments)

        monkeypatch.setattr(stores.usage, "put", away)
        for _ in range(3):
            await served.ask()
        assert REGISTRY.get_sample_value("conserve:usage_waiting_requests") == 3
        assert await served.usage() == {}
        is_away = False
        assert await served.until(ended(3)) == {("online", "m"): WHOLE + WHOLE + WHOLE}
        assert REGISTRY.get_sample_value("conserve:usage_waiting_requests") == 0


async def test_metrics_count_the_same() -> None:
    def counted(kind: str) -> float:
        labels = {"class": "flex", "kind": kind}
        return REGISTRY.get_sample_value("conserve:usage_tokens_total", labels) or 0.0

    before = {kind: counted(kind) for kind in bill.KINDS}
    async with serving() as served:
        await served.ask(service_tier="flex")
        await served.until(ended(1))
    assert {kind: counted(kind) - before[kind] for kind in bill.KINDS} == {
        "input": len(PROMPT),
        "cached": NUM_CACHED,
        "output": NUM_OUTPUT,
    }


async def test_control_a_meter_that_forgets_what_it_told_counts_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That the tests above would see it."""
    from conserve.server.usage import meter

    def all_of_it(one: Any) -> Counts:
        return Counts(output_tokens=one._state.detokenizer.num_output_tokens())

    monkeypatch.setattr(meter._Asked, "more_output", all_of_it)
    async with serving() as served:
        served.engine.may_end.clear()
        asked = asyncio.create_task(served.ask(stream=True))
        await served.until(lambda found: bool(found))
        served.engine.may_end.set()
        await asked
        found = await served.until(ended(1))
    assert found["online", "m"].output_tokens > NUM_OUTPUT
