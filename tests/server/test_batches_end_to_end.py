"""Batches on the real server, with the official client, while chat goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.waiting import LIMIT_S, eventually

pytestmark = pytest.mark.server

MODEL = "SmolLM2-135M-Instruct"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def line(custom_id: str, **changes: Any) -> dict[str, Any]:
    body = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    body |= {"messages": [{"role": "user", "content": f"Say something about {custom_id}."}]}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body | changes}


def submit(
    client: openai.OpenAI, lines: list[dict[str, Any]], endpoint: Any = CHAT, **extra: Any
) -> Any:
    content = "\n".join(json.dumps(each) for each in lines).encode()
    file = client.files.create(file=("lines.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", extra_body=extra
    )


def chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Name three colours."}], max_tokens=4
    )
    assert reply.choices[0].message.content
    assert reply.service_tier == "default"


def until(client: openai.OpenAI, batch_id: str, *statuses: str) -> Any:
    """The batch once it is in one of the states; a chat is answered before each look at it."""
    deadline = time.monotonic() + LIMIT_S
    while (batch := client.batches.retrieve(batch_id)).status not in statuses:
        assert time.monotonic() < deadline, f"still {batch.status}: {batch.request_counts}"
        chat(client)
    return batch


def test_a_batch_from_upload_to_output(client: openai.OpenAI) -> None:
    ids = [f"thing-{n}" for n in range(40)]
    batch = submit(client, [line(each) for each in ids], deadline="2h")
    assert batch.deadline - batch.created_at == 7200
    batch = until(client, batch.id, "completed", "failed", "expired", "cancelled")
    assert batch.status == "completed", batch.errors
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (40, 40, 0)
    assert batch.error_file_id is None
    assert batch.deadline_state == "met"
    assert batch.usage.output_tokens <= 40 * 8
    answers = [json.loads(text) for text in client.files.content(batch.output_file_id).iter_lines()]
    assert sorted(answer["custom_id"] for answer in answers) == sorted(ids)
    for answer in answers:
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["service_tier"] == "flex"
        assert answer["response"]["body"]["choices"][0]["message"]["content"]


BODIES = [
    ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 8}),
    ("/v1/responses", {"input": "Name three colours.", "max_output_tokens": 16}),
]


@pytest.mark.parametrize(("endpoint", "body"), BODIES)
def test_other_endpoints(client: openai.OpenAI, endpoint: str, body: dict[str, Any]) -> None:
    body = {"model": MODEL, "temperature": 0, **body}
    lines = [{"custom_id": f"{n}", "method": "POST", "url": endpoint, "body": body} for n in "ab"]
    batch = until(client, submit(client, lines, endpoint).id, "completed", "failed")
    assert (batch.status, batch.error_file_id) == ("completed", None), batch.errors
    output = client.files.content(batch.output_file_id).iter_lines()
    answers = {row["custom_id"]: row["response"]["body"] for row in map(json.loads, output)}
    assert set(answers) == {"a", "b"}
    assert answers["a"]["service_tier"] == "flex"
    assert batch.usage.input_tokens > 0
    assert batch.usage.output_tokens > 0


def test_what_the_model_lacks_is_refused(client: openai.OpenAI) -> None:
    lines = [line("a") | {"url": "/v1/embeddings"}]
    with pytest.raises(openai.BadRequestError, match="has no /v1/embeddings"):
        submit(client, lines, "/v1/embeddings")


def test_the_usage_tells_what_the_prefix_cache_saved(client: openai.OpenAI) -> None:
    story = "Once there was a fox. " * 60
    messages = [{"role": "user", "content": story}]
    batch = submit(client, [line(each, messages=messages) for each in ("first", "second")])
    batch = until(client, batch.id, "completed", "failed")
    again = until(client, submit(client, [line("third", messages=messages)]).id, "completed")
    # Whole blocks only, and on a CPU a block is 128 tokens.
    assert again.usage.input_tokens_details.cached_tokens > 0.5 * again.usage.input_tokens


def test_a_bad_line_fails_the_batch_and_is_named(client: openai.OpenAI) -> None:
    lines = [line("good"), line("streams", stream=True), line("fine")]
    batch = until(client, submit(client, lines).id, "failed", "completed")
    assert batch.status == "failed"
    assert [(error.line, error.code) for error in batch.errors.data] == [
        (2, "stream_not_supported")
    ]


TOO_MUCH: list[dict[str, Any]] = [
    {"max_tokens": 100_000},
    {"max_tokens": 10**20},
    {"max_completion_tokens": 10**400},
    {"n": 0},
    {"n": 10**9},
    {"seed": 10**30},
    {"messages": [{"role": "user", "content": "long " * 9000}]},
]


def test_a_line_that_asks_too_much_fails_alone(client: openai.OpenAI) -> None:
    lines = [line(f"bad-{n}", **body) for n, body in enumerate(TOO_MUCH)] + [line("good")]
    batch = until(client, submit(client, lines).id, "completed", "failed")
    assert batch.status == "completed", batch.errors
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, len(TOO_MUCH))
    errors = [json.loads(text) for text in client.files.content(batch.error_file_id).iter_lines()]
    assert {row["custom_id"] for row in errors} == {f"bad-{n}" for n in range(len(TOO_MUCH))}
    for row in errors:
        assert row["response"]["status_code"] == 400, row
        assert row["response"]["body"]["error"]["message"]


USER = {"role": "user", "content": "Say hello."}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}


def shaped(**schema: Any) -> dict[str, Any]:
    form = {"name": "x", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": form}}


GOOD: dict[str, dict[str, Any]] = {
    "developer": {"messages": [{"role": "developer", "content": "Be short."}, USER]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
    "prefilled": {
        "messages": [USER, {"role": "assistant", "content": "Good"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "several": {"n": 2, "temperature": 1.0, "seed": 7},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "stops": {"stop": ["\n", "."], "min_tokens": 1},
    "nulls": {"seed": None, "stop": None, "user": None, "max_completion_tokens": None},
    "extras": {"store": True, "metadata": {"a": "b"}, "user": "u", "reasoning_effort": "low"},
    "classes": {"priority": -100, "service_tier": "priority"},
    "floats": {"max_tokens": 4.0, "n": 1.0},
    'quoted "\t\u2028😀': {},
    "regex": {"structured_outputs": {"regex": "[0-9]{4}"}},
    "shaped": shaped(type="object", properties={"a": {"enum": [1]}}, required=["a"]),
}
BAD: dict[str, dict[str, Any]] = {
    "image": {"messages": [{"role": "user", "content": [IMAGE]}]},
    "tools": {"tools": [TOOL], "tool_choice": "auto"},
    "token of no vocabulary": {"logit_bias": {"999999": 5}},
    "temperature": {"temperature": 9.5},
    "no regex": {"structured_outputs": {"regex": "([a-z"}},
    "no type": shaped(type="strnig"),
    "no reference": shaped(type="object", properties={"a": {"$ref": "#/$defs/nowhere"}}),
    "two kinds": {"structured_outputs": {"regex": "a", "choice": ["a"]}},
}


def test_whatever_a_line_asks_it_has_one_result(client: openai.OpenAI) -> None:
    """An answer, or what the model cannot do: no line is tried again and again, none takes another
    along, and none leaves its class."""
    lines = [line(each, **body) for each, body in (GOOD | BAD).items()]
    batch = until(client, submit(client, lines).id, "completed", "failed")
    assert batch.status == "completed", batch.errors
    for file_id, names in ((batch.output_file_id, GOOD), (batch.error_file_id, BAD)):
        rows = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
        assert sorted(row["custom_id"] for row in rows) == sorted(names)
        for row in rows:
            answer = row["response"]
            if names is GOOD:
                assert answer["body"]["service_tier"] == "flex"
            else:
                assert (answer["status_code"], row["error"]) == (400, None), row
                assert answer["body"]["error"]["message"]


def test_what_a_score_is_made_from_is_whole(client: openai.OpenAI) -> None:
    """As lm-eval asks for it: the log probability of each token of the prompt, in a long prompt and
    beside others."""
    body = {"model": MODEL, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    lengths = (50, 300, 700)
    lines = [
        {
            "custom_id": str(length),
            "method": "POST",
            "url": "/v1/completions",
            "body": body | {"prompt": [100 + n % 997 for n in range(length)]},
        }
        for length in lengths
    ]
    batch = until(client, submit(client, lines, "/v1/completions").id, "completed", "failed")
    output = client.files.content(batch.output_file_id).iter_lines()
    rows = {row["custom_id"]: row["response"]["body"] for row in map(json.loads, output)}
    for length in lengths:
        (choice,) = rows[str(length)]["choices"]
        found = choice["logprobs"]["token_logprobs"]
        assert len(found) == length + 1
        assert [n for n, each in enumerate(found) if each is None] == [0]


def test_a_cancelled_batch_leaves_the_engine_idle(client: openai.OpenAI, server: Any) -> None:
    """Its lines would run for minutes: what frees the engine is the cancellation."""
    eventually(lambda: server.metric("conserve:running_requests") == 0)
    before = server.metric("vllm:generation_tokens_total")
    lines = [line(f"long-{n}", max_tokens=8000, ignore_eos=True) for n in range(8)]
    batch = submit(client, lines)
    eventually(lambda: server.metric("conserve:running_requests") >= 8)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = until(client, batch.id, "cancelled")
    assert batch.request_counts.completed == 0
    eventually(lambda: server.metric("conserve:running_requests") == 0)
    eventually(lambda: server.metric("conserve:kv_blocks") == 0)
    assert server.metric("vllm:generation_tokens_total") - before < 8 * 8000


def test_what_is_no_batch_of_ours_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_0")
