"""The server as a user meets it: the official client, the default model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from conserve.engine import phases
from tests.waiting import eventually

pytestmark = pytest.mark.server

MODEL = "SmolLM2-135M-Instruct"
QUESTION: Any = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="session")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_start_said_what_it_was_at(server: Any) -> None:
    """Phases in their order, told by four kinds of processes, and ready where it is."""
    eventually(lambda: f"s: ready at {server.url}" in server.log.read_text())
    log = server.log.read_text()
    said = re.findall(r"ConServe at ([\d.]+) s: (.+)", log)
    names = [name for _, name in said]
    once = (phases.UNPACKING, phases.PROFILING)
    always = [name for name in phases.NAMES[:-1] if name not in once]
    assert [name for name in names if name not in once] == [*always, f"ready at {server.url}"]
    assert names == sorted(names, key=[*phases.NAMES[:-1], names[-1]].index)
    times = [float(at_s) for at_s, _ in said]
    assert times == sorted(times)


TIERS = [({}, "default"), ({"service_tier": "auto"}, "default"), ({"service_tier": "flex"}, "flex")]
tiers = pytest.mark.parametrize(("asked", "told"), TIERS)


@tiers
def test_chat(client: openai.OpenAI, asked: Any, told: str) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=8, temperature=0, **asked
    )
    assert reply.service_tier == told
    assert reply.choices[0].message.content
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 8


@tiers
def test_chat_stream(client: openai.OpenAI, asked: Any, told: str) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=8, temperature=0, stream=True, **asked
    )
    chunks = list(stream)
    assert {chunk.service_tier for chunk in chunks} == {told}
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_a_stream_says_what_the_whole_says(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = client.chat.completions.create(stream=True, service_tier="flex", **asked)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole


@tiers
def test_completions(client: openai.OpenAI, asked: Any, told: str) -> None:
    reply = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0, extra_body=asked
    )
    assert reply.model_dump()["service_tier"] == told
    assert reply.choices[0].text


@tiers
def test_completions_stream(client: openai.OpenAI, asked: Any, told: str) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="Once upon", max_tokens=8, stream=True, extra_body=asked
    )
    assert {chunk.model_dump()["service_tier"] for chunk in stream} == {told}


@tiers
def test_responses(client: openai.OpenAI, asked: Any, told: str) -> None:
    reply = client.responses.create(
        model=MODEL, input="Name three colours.", max_output_tokens=16, **asked
    )
    assert reply.service_tier == told
    assert reply.output_text


@tiers
def test_responses_stream(client: openai.OpenAI, asked: Any, told: str) -> None:
    stream = client.responses.create(
        model=MODEL, input="Name three colours.", max_output_tokens=16, stream=True, **asked
    )
    events = list(stream)
    told_in = [e.response.service_tier for e in events if hasattr(e, "response")]
    assert len(told_in) >= 2
    assert set(told_in) == {told}


CHAT, TEXT = "/chat/completions", "/completions"
SEVERAL: list[tuple[str, dict[str, Any], int]] = [
    # (path, body, what it asks of the engine at least)
    (TEXT, {"prompt": "The gate", "n": 2, "use_beam_search": True}, 7),
    (CHAT, {"messages": QUESTION, "n": 2, "use_beam_search": True}, 7),
    (CHAT, {"messages": QUESTION, "n": 2, "use_beam_search": True, "stream": True}, 7),
    (TEXT, {"prompt": "The gate", "n": 3, "temperature": 1}, 3),
    (CHAT, {"messages": QUESTION, "n": 3, "temperature": 1, "stream": True}, 3),
    (TEXT, {"prompt": ["The gate", "The wall", "The door"]}, 3),
    (f"{CHAT}/batch", {"messages": [QUESTION, QUESTION]}, 2),
]


@pytest.mark.parametrize(("path", "body", "least"), SEVERAL)
def test_what_an_offline_request_asks_of_the_engine_is_offline_all_through(
    server: Any, path: str, body: dict[str, Any], least: int
) -> None:
    def num(label: str) -> float:
        return float(server.metric("conserve:requests_total", **{"class": label}))

    online, offline = num("online"), num("offline")
    asked = {"model": MODEL, "temperature": 0, "max_tokens": 4, "service_tier": "flex", **body}
    reply = httpx.post(f"{server.url}/v1{path}", json=asked, timeout=120)
    assert reply.status_code == 200, reply.text
    eventually(lambda: num("offline") >= offline + least)
    assert num("online") == online


def test_what_first_tokens_waited_for_is_all_of_their_time(
    client: openai.OpenAI, server: Any
) -> None:
    tiers: list[dict[str, Any]] = [{}, {"service_tier": "flex"}, {}]
    for asked in tiers:
        client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=4, **asked)

    def told(name: str, **labels: str) -> float:
        return float(server.metric(f"conserve:{name}", **labels))

    def adds_up() -> bool:
        whole_s = told("ttft_seconds_sum", **{"class": "online"})
        num = told("ttft_seconds_count", **{"class": "online"})
        parts_s = told("first_token_part_seconds_sum")
        own = told("first_token_part_seconds_count", part="prefill")
        return own == num >= 2 and parts_s == pytest.approx(whole_s, rel=1e-4)

    eventually(adds_up)  # it is told a little later


def test_a_priority_above_0_is_offline(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=4, extra_body={"priority": 3}
    )
    assert reply.service_tier == "flex"


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_tier_is_named_in_the_error(client: openai.OpenAI, stream: bool) -> None:
    tier: Any = "cheap"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, service_tier=tier, stream=stream
        )
    assert caught.value.param == "service_tier"
    assert "'cheap'" in caught.value.message


def test_vllm_still_words_its_own_errors(server: Any) -> None:
    kind = {"content-type": "application/json"}
    reply = httpx.post(f"{server.url}/v1/chat/completions", content=b"{not json", headers=kind)
    assert reply.status_code == 400
    assert "JSON" in reply.json()["error"]["message"]
    reply = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "priority": "high"})
    assert reply.status_code == 400
    assert "priority" in reply.json()["error"]["message"]


@pytest.mark.parametrize("tier", ["default", "flex"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_dropped_client_ends_its_request(server: Any, tier: str, stream: bool) -> None:
    """It leaves the engine and its blocks come back, long before its last token."""
    eventually(lambda: server.metric("conserve:running_requests") == 0)
    before = server.metric("vllm:generation_tokens_total")
    body = {"model": MODEL, "prompt": "Count:", "max_tokens": 8000, "ignore_eos": True}
    body |= {"service_tier": tier, "stream": stream}
    url = f"{server.url}/v1/completions"
    if stream:
        with httpx.stream("POST", url, json=body, timeout=60) as reply:
            lines = reply.iter_lines()  # kept: dropping it would close the connection
            assert next(lines).startswith("data: ")
            eventually(lambda: server.metric("conserve:running_requests") == 1)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=httpx.Timeout(60, read=1))
    eventually(lambda: server.metric("conserve:running_requests") == 0)
    eventually(lambda: server.metric("conserve:kv_blocks") == 0)
    assert server.metric("vllm:generation_tokens_total") - before < 8000


@pytest.mark.parametrize("stream", [True, False])
def test_a_flex_request_that_finds_no_room_leaves_nothing(
    server: Any, client: openai.OpenAI, stream: bool
) -> None:
    """No first token comes within a microsecond: it is refused, and leaves the engine."""
    patient = client.with_options(max_retries=0)
    with pytest.raises(openai.RateLimitError) as refused:
        patient.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Count:"}],
            max_tokens=4000,
            service_tier="flex",
            stream=stream,
            extra_headers={"x-flex-wait-s": "0.000001"},
        )
    assert refused.value.code == "resource_unavailable"
    assert refused.value.response.headers["retry-after"] == "1"
    eventually(lambda: server.metric("conserve:running_requests") == 0)
    eventually(lambda: server.metric("conserve:waiting_requests") == 0)
    eventually(lambda: server.metric("conserve:kv_blocks") == 0)


def test_what_it_serves_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_start_says_what_was_chosen(server: Any) -> None:
    log = server.log.read_text()
    assert "from the machine: the engine says them when it has measured its steps" in log
    assert "offline work gets at least 20%" in log
    assert MODEL in log
    assert "Traceback" not in log


def test_targets_of_the_machine_are_said_and_shown(server: Any) -> None:
    """In the log by the engine that measured them, and on the page by the API process."""
    with httpx.stream("GET", f"{server.url}/dashboard/feed", timeout=60) as reply:
        lines = reply.iter_lines()
        hello = next(line for line in lines if line.startswith("data: "))
    facts = json.loads(hello.removeprefix("data: "))["facts"]
    log = server.log.read_text()
    for name in ("TTFT", "TBT"):
        reason = facts[f"{name.lower()}_target_reason"]
        assert reason.startswith("from the machine: ")
        target_ms = 1000 * facts[f"{name.lower()}_target_s"]
        assert f"ConServe: {name} target {target_ms:g} ms, {reason}" in log


def test_a_request_may_name_its_own_targets(client: openai.OpenAI) -> None:
    """vLLM takes what we hand it, and what is none is refused by name."""
    asked: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 2}
    names = {"x-slo-ttft-ms": "900", "x-llm-d-slo-tpot-ms": "70.5"}
    for tier in ("default", "flex"):
        reply = client.chat.completions.create(service_tier=tier, extra_headers=names, **asked)
        assert reply.choices[0].message.content
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(extra_body={"x-slo-tbt-ms": -1}, **asked)
    assert refused.value.param == "x-slo-tbt-ms"
