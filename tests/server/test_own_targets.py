"""A request's own targets: from what a client sends to what the engine reads of vLLM's request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from conserve.core.snapshot import Targets
from conserve.engine.promises import TBT_ARG, TTFT_ARG, OwnTargets, Promises
from conserve.engine.settings import EngineSettings
from conserve.server.tiers.middleware import ServiceTierMiddleware
from conserve.server.tiers.targets import BadTargetError, move_targets

pytestmark = pytest.mark.anyio
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class App:
    """Answers chats as vLLM does, and keeps the bodies that it is given."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        app = FastAPI()

        async def create(request: Request, body: dict[str, Any]) -> Response:
            self.bodies.append(body)
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "Ho"},
            }
            chat = {"id": "a", "object": "chat.completion", "created": 1, "model": "m"}
            return JSONResponse({**chat, "choices": [choice]})

        for path in PATHS:
            app.post(path, response_model=None)(create)
        app.add_middleware(ServiceTierMiddleware)
        self.transport = httpx.ASGITransport(app)


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
async def client(app: App) -> AsyncIterator[openai.AsyncOpenAI]:
    # The client takes it, though its types name httpx2's alone.
    http: Any = httpx.AsyncClient(transport=app.transport)
    async with openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", http_client=http, max_retries=0
    ) as client:
        yield client


async def test_the_official_client_names_targets_in_headers_or_in_the_body(
    app: App, client: openai.AsyncOpenAI
) -> None:
    headers = {"x-slo-ttft-ms": "300", "X-SLO-TBT-MS": "45.5"}
    fields = {"x-slo-ttft-ms": 300, "x-slo-tbt-ms": 45.5}
    for sent in ({"extra_headers": headers}, {"extra_body": fields}):
        reply = await client.chat.completions.create(model="m", messages=MESSAGES, **sent)
        assert reply.service_tier == "default"
    for body in app.bodies:
        assert body["vllm_xargs"] == {TTFT_ARG: 0.3, TBT_ARG: 0.0455}
        assert body["messages"] == MESSAGES
        assert not any(name.startswith("x-") for name in body)


@pytest.mark.parametrize("path", PATHS)
async def test_every_endpoint_takes_them(app: App, path: str) -> None:
    async with httpx.AsyncClient(transport=app.transport, base_url="http://test") as client:
        await client.post(path, json={"service_tier": "flex"}, headers={"x-slo-ttft-ms": "60000"})
    (body,) = app.bodies
    assert (body["priority"], body["vllm_xargs"]) == (1, {TTFT_ARG: 60.0})


@pytest.mark.parametrize("given", ["0", "-5", "soon", "", "nan", "inf", "1e400"])
@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-llm-d-slo-tpot-ms"])
async def test_a_bad_header_is_400_with_its_name(
    app: App, client: openai.AsyncOpenAI, name: str, given: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(
            model="m", messages=MESSAGES, extra_headers={name: given}
        )
    assert refused.value.param == name
    assert f"{name} must be a number of milliseconds above 0, not '{given}'" in str(refused.value)
    assert not app.bodies


@pytest.mark.parametrize("given", [0, -1, True, "soon", [300], {"ms": 300}, 10**400])
async def test_a_bad_field_is_400_with_its_name(
    app: App, client: openai.AsyncOpenAI, given: object
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(
            model="m", messages=MESSAGES, stream=True, extra_body={"x-slo-tbt-ms": given}
        )
    assert refused.value.param == "x-slo-tbt-ms"
    assert refused.value.type == "BadRequestError"
    assert not app.bodies


@pytest.mark.parametrize(
    ("headers", "fields", "found"),
    [
        ({"x-llm-d-slo-ttft-ms": "400", "x-llm-d-slo-tpot-ms": "30"}, {}, (0.4, 0.03)),
        ({"x-slo-tpot-ms": "30"}, {}, (None, 0.03)),
        ({"x-slo-ttft-ms": "400"}, {"x-slo-ttft-ms": 900}, (0.4, None)),
        ({"x-slo-ttft-ms": "400", "x-llm-d-slo-ttft-ms": "900"}, {}, (0.4, None)),
        ({}, {"x-slo-tbt-ms": None, "x-slo-ttft-ms": "400"}, (0.4, None)),
        ({}, {"x-slo-tbt-ms": None}, (None, None)),
    ],
)
def test_which_name_counts(
    headers: dict[str, str], fields: dict[str, Any], found: tuple[float | None, float | None]
) -> None:
    body = dict(fields)
    move_targets(body, headers)
    xargs = body.pop("vllm_xargs", {})
    assert (xargs.get(TTFT_ARG), xargs.get(TBT_ARG)) == found
    assert not body


def test_other_arguments_are_kept_and_strange_ones_left_to_vllm() -> None:
    body: dict[str, Any] = {"vllm_xargs": {"mine": 1}, "x-slo-ttft-ms": 400}
    move_targets(body, {})
    assert body == {"vllm_xargs": {"mine": 1, TTFT_ARG: 0.4}}
    body = {"vllm_xargs": [1], "x-slo-ttft-ms": 400}
    move_targets(body, {})
    assert body == {"vllm_xargs": [1]}
    with pytest.raises(BadTargetError, match="x-slo-ttft-ms must be"):
        move_targets({"vllm_xargs": [1], "x-slo-ttft-ms": -1}, {})


@pytest.mark.engine
@pytest.mark.parametrize("n", [1, 2])
def test_they_reach_the_engine_by_vllms_own_way(n: int) -> None:
    """Body -> sampling parameters -> the message to the engine -> its request."""
    pytest.importorskip("vllm")
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.parallel_sampling import ParentRequest
    from vllm.v1.request import Request as EngineRequest
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    body: dict[str, Any] = {"model": "m", "messages": MESSAGES, "n": n, "temperature": 1}
    move_targets(body, {"x-slo-ttft-ms": "600", "x-slo-tbt-ms": "20"})
    params = ChatCompletionRequest(**body).to_sampling_params(16, {})
    asked = EngineCoreRequest("r", [1, 2], None, params, None, 5.0, None, None, None)
    if n > 1:
        asked.external_req_id = "r"
        _, asked.sampling_params = ParentRequest(asked).get_child_info(0)
    frames = MsgpackEncoder().encode(asked)
    request = EngineRequest.from_engine_core_request(
        MsgpackDecoder(EngineCoreRequest).decode(frames), None
    )
    assert OwnTargets.named_by(request) == (0.6, 0.02)
    for share, own in ((0.5, (0.6, 0.1)), (0.0, (0.6, 0.02)), (1.0, (1.0, 0.2))):
        promises = Promises(EngineSettings(slo_min_share=share))
        assert promises.targets == Targets()
        assert promises.own_targets(request) == own


class Asked:
    """What is read of vLLM's request."""

    def __init__(self, extra_args: object, priority: int = 0) -> None:
        self.priority = priority
        self.sampling_params = type("Params", (), {"extra_args": extra_args})


@pytest.mark.parametrize("given", [None, {}, {TTFT_ARG: "1"}, {TTFT_ARG: True}, {TTFT_ARG: -1.0}])
def test_the_engine_believes_no_strange_target(given: object) -> None:
    assert OwnTargets.named_by(Asked(given)) == (None, None)
    assert Promises(EngineSettings()).wait_s(Asked(given)) == 1.0
    assert Promises(EngineSettings()).wait_s(Asked(given, priority=1)) == 600.0
    pooling = Asked(None)
    pooling.sampling_params = None  # type: ignore[assignment]
    assert OwnTargets.named_by(pooling) == (None, None)


def test_offline_requests_may_hurry_as_they_like() -> None:
    promises = Promises(EngineSettings())
    assert promises.wait_s(Asked({TTFT_ARG: 0.1}, priority=2)) == 0.1
    assert promises.wait_s(Asked({TTFT_ARG: 0.1})) == 0.5, "half of the server's target"
    assert promises.wait_s(Asked({TTFT_ARG: 9.0})) == 9.0
