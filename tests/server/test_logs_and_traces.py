"""What one server with JSON logs and tracing says of chat, and of a batch beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from tests.server.otlp_collector import Collector, collector
from tests.waiting import eventually

pytestmark = pytest.mark.server

MODEL = "SmolLM2-135M-Instruct"
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
NUM_LINES = 6
TRACE = "0af7651916cd43dd8448eb211c80319c"


@dataclass
class Told:
    """What the server had told by the time its work was done."""

    spans: Collector
    chat_batches: list[str]
    responses_batch: str
    num_stops: float
    log: list[str]


def lines_of_batch(url: str, count: int, body: dict[str, Any]) -> bytes:
    lines = [
        {"custom_id": f"{n}", "method": "POST", "url": url, "body": {"model": MODEL, **body}}
        for n in range(count)
    ]
    return "\n".join(map(json.dumps, lines)).encode()


def submit(client: openai.OpenAI, url: Any, count: int, body: dict[str, Any]) -> str:
    content = lines_of_batch(url, count, body)
    file = client.files.create(file=("lines.jsonl", content), purpose="batch")
    hour: Any = "1h"  # OpenAI's own client knows of no window but a day
    batch = client.batches.create(input_file_id=file.id, endpoint=url, completion_window=hour)
    return batch.id


def chat(client: openai.OpenAI, **extra: Any) -> None:
    question: Any = [{"role": "user", "content": "Name three colours."}]
    client.chat.completions.create(model=MODEL, messages=question, max_tokens=2, **extra)


def ended(client: openai.OpenAI, batch_id: str) -> bool:
    return client.batches.retrieve(batch_id).status == "completed"


@pytest.fixture(scope="module")
def told(start_server: Any) -> Iterator[Told]:
    """One server's life: chat with a trace, batches until chat has interrupted one, a batch of
    responses, and one that is cancelled."""
    with collector() as spans, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        words = ("--otlp-traces-endpoint", spans.url, "--log-json", "--log-interval-s", "1")
        with start_server(*words, "--additional-config.conserve.stop", "eager") as server:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
                found = work(server, client, spans)
            yield found


def work(server: Any, client: openai.OpenAI, spans: Collector) -> Told:
    chat(client, extra_headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
    asked = {"messages": [{"role": "user", "content": "Tell a story. " * 40}]}
    batches: list[str] = []

    def interrupted() -> bool:
        """A fast machine ends a batch before any chat came between: then another follows."""
        if not batches or ended(client, batches[-1]):
            story = asked | {"max_tokens": 24, "ignore_eos": True}
            batches.append(submit(client, CHAT, NUM_LINES, story))
        chat(client)
        return float(server.metric("conserve:stopped_steps_total")) > 0

    eventually(interrupted)
    eventually(lambda: all(ended(client, batch) for batch in batches))
    responses = submit(client, RESPONSES, 1, {"input": "Hello", "max_output_tokens": 16})
    eventually(lambda: ended(client, responses))
    # Whoever names a request after another's line gets no place under its batch.
    forged = {"service_tier": "flex", "extra_headers": {"X-Request-Id": f"{batches[0]}-1"}}
    chat(client, **forged)
    eventually(lambda: len(offline(spans)) == NUM_LINES * len(batches) + 2)
    num_stops = server.metric("conserve:stopped_steps_total")
    endless = submit(client, CHAT, 500, asked | {"max_tokens": 64, "ignore_eos": True})
    eventually(lambda: any(line["conserve"]["live_batches"] for line in logged(server)))
    client.batches.cancel(endless)
    return Told(spans, batches, responses, num_stops, server.log.read_text().splitlines())


def offline(spans: Collector) -> list[dict[str, Any]]:
    return [each for each in spans.requests() if each["conserve.class"] == "offline"]


def logged(server: Any) -> list[dict[str, Any]]:
    return minutes(server.log.read_text().splitlines())


def minutes(log: list[str]) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in log if line.startswith("{")]
    return [line for line in parsed if line["message"].startswith("Last ")]


def test_a_clients_trace_goes_on_and_says_the_class(told: Told) -> None:
    (span,) = [found for _, trace, found in told.spans.spans if trace == TRACE]
    assert span["conserve.class"] == "online"
    assert (span["conserve.stops"], span["conserve.displacements"]) == (0, 0)
    assert "conserve.batch.id" not in span
    assert span["gen_ai.usage.completion_tokens"] == 2


def test_every_line_of_a_batch_has_its_span(told: Told) -> None:
    mine = (*told.chat_batches, told.responses_batch)
    found = [each for each in offline(told.spans) if each.get("conserve.batch.id") in mine]
    places = [(each["conserve.batch.id"], each["conserve.batch.line"]) for each in found]
    wanted = [(batch, n + 1) for batch in told.chat_batches for n in range(NUM_LINES)]
    wanted.append((told.responses_batch, 1))
    assert sorted(places) == sorted(wanted)


def test_stops_are_in_the_spans_of_those_they_hit(told: Told) -> None:
    """A stopped step has at least one request in it, and only offline ones."""
    assert told.num_stops > 0
    assert sum(each["conserve.stops"] for each in offline(told.spans)) >= told.num_stops
    online = [each for each in told.spans.requests() if each["conserve.class"] == "online"]
    assert {each["conserve.stops"] for each in online} == {0}


def test_the_log_is_json(told: Told) -> None:
    odd = [line for line in told.log if line.strip() and not line.startswith("{")]
    assert [line for line in odd if not PRINTED.match(line)] == []
    parsed = [json.loads(line) for line in told.log if line.startswith("{")]
    assert parsed[0]["phase"] == "importing vLLM"
    assert parsed[1]["message"].startswith("ConServe on vLLM ")
    assert {"asctime", "levelname", "name", "process", "message"} <= set(parsed[-1])
    names = {line.get("name", "").split(".")[0] for line in parsed}
    assert {"vllm", "uvicorn"} <= names


PRINTED = re.compile(r"\s|\S*\.py:\d+: \w*Warning: |\[?[IWE]\d{4} |Loading safetensors |\[Gloo\]")
"""By libraries, past every logger: source lines, Python's and PyTorch's warnings, progress."""


def test_a_line_of_the_log_says_what_matters(told: Told) -> None:
    found = minutes(told.log)
    assert any(line["conserve"]["offline_tokens_per_s"] > 0 for line in found)
    assert any((line["conserve"]["online_first_tokens"] or 0) > 0 for line in found)
    assert all(line["conserve"]["ttft_target_s"] > 0 for line in found), "the machine's"
    assert any(line["conserve"]["live_batches"] > 0 for line in found)


def test_metrics_say_the_same(told: Told) -> None:
    totals = [line["conserve"]["stopped_steps"] for line in minutes(told.log)]
    assert sum(totals) <= told.num_stops
