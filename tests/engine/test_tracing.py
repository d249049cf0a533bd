"""A request's span says its class and what befell it on its way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine.batch_line import running_line
from conserve.engine.tracing import TraceNotes, say_more_in_spans, span_attributes
from tests.engine.device import Device
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

LINE = "batch_" + "0a" * 16 + "-12"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    scheduler = make_scheduler(tmp_path, num_blocks=24)
    scheduler.driver.notes = TraceNotes(enabled=True)
    yield Engine(scheduler, Device(BLOCK_SIZE))
    scheduler.shutdown()


def spans(engine: Engine) -> dict[str, dict[str, str | int]]:
    """Request -> the attributes of its span, once everything has run."""
    found: dict[str, dict[str, str | int]] = {}
    update = engine.scheduler.update_from_output

    def watched(*args: Any) -> Any:
        outputs = update(*args)
        for client in outputs.values():
            for one in client.outputs:
                if one.finish_reason is not None:
                    found[one.request_id] = span_attributes(one.trace_headers)
        return outputs

    engine.scheduler.update_from_output = watched
    engine.run()
    return found


def add(engine: Engine, name: str, num_prompt: int, num_output: int, *, online: bool) -> None:
    chance = random.Random(name)
    prompt = [chance.randrange(1, 1000) for _ in range(num_prompt)]
    now_s = engine.scheduler.clock()
    engine.add(make_request(name, prompt, num_output, online=online, arrival_s=now_s))


def test_a_stopped_request_says_how_often(engine: Engine) -> None:
    add(engine, "off", 20, 4, online=False)
    stops = iter([True, True])
    engine.stop = lambda step: next(stops, False)
    found = spans(engine)
    assert found == {
        "off": {
            "conserve.class": "offline",
            "conserve.stops": 2,
            "conserve.displacements": 0,
            "conserve.restores": 0,
        }
    }


def test_a_displaced_request_says_how_often_and_that_it_came_back(engine: Engine) -> None:
    add(engine, "off", 60, 12, online=False)
    for _ in range(4):
        engine.step()
    add(engine, "on", 60, 4, online=True)
    found = spans(engine)
    assert found["on"]["conserve.class"] == "online"
    assert found["on"]["conserve.displacements"] == 0
    assert found["off"]["conserve.displacements"] == 1
    assert found["off"]["conserve.restores"] == 1


def test_without_tracing_no_header_is_made(engine: Engine) -> None:
    """The negative control: what the tests above see comes from the notes."""
    engine.scheduler.driver.notes = TraceNotes(enabled=False)
    add(engine, "off", 20, 4, online=False)
    stops = iter([True])
    engine.stop = lambda step: next(stops, False)
    assert spans(engine) == {"off": {}}
    assert engine.num_stops == 1


def test_the_clients_trace_goes_on() -> None:
    request = SimpleNamespace(priority=0, trace_headers={"traceparent": "00-a-b-01"})
    TraceNotes(enabled=True).came(request)
    assert request.trace_headers == {"traceparent": "00-a-b-01", "conserve.class": "online"}


class Processor:
    """vLLM's OutputProcessor as far as spans need it."""

    tracing_enabled = True

    def add_request(self, request: Any, prompt: str | None, index: int = 0) -> None:
        self.added = request

    def do_tracing(self, engine_core_output: Any, req_state: Any, stats: Any) -> None:
        raise NotImplementedError


def added(request: Any, *, tracing: bool = True) -> dict[str, str] | None:
    """The headers with which the engine gets it."""

    class OutputProcessor(Processor):
        """Its own, to be wrapped."""

    say_more_in_spans(SimpleNamespace(OutputProcessor=OutputProcessor, instrument_manual=print))
    one = OutputProcessor()
    one.tracing_enabled = tracing
    one.add_request(request, None, index=1)
    assert one.added is request
    headers: dict[str, str] | None = request.trace_headers
    return headers


def request_called(name: str, headers: dict[str, str] | None = None) -> Any:
    return SimpleNamespace(external_req_id=name, request_id=name, trace_headers=headers)


def test_a_line_of_a_batch_is_named() -> None:
    with running_line(LINE):
        headers = added(request_called("chatcmpl-1", {"traceparent": "00-a-b-01"}))
    assert headers is not None
    assert headers["traceparent"] == "00-a-b-01"
    found = span_attributes({**headers, "conserve.class": "offline"})
    assert (found["conserve.batch.id"], found["conserve.batch.line"]) == (LINE[:-3], 12)


@pytest.mark.parametrize("name", [LINE, f"chatcmpl-{LINE}", f"resp_{LINE}_0"])
def test_a_clients_own_word_for_its_request_names_no_batch(name: str) -> None:
    """Any client may send any X-Request-Id, that of another's line, too."""
    assert added(request_called(name)) is None


def test_without_tracing_a_line_needs_no_headers() -> None:
    with running_line(LINE):
        assert added(request_called("chatcmpl-1"), tracing=False) is None


def test_only_the_requests_own_span_gets_its_notes() -> None:
    made: list[dict[str, Any]] = []

    def instrument_manual(span_name: str, attributes: dict[str, Any] | None = None) -> None:
        made.append({"span_name": span_name, "attributes": attributes})

    module = SimpleNamespace(instrument_manual=instrument_manual)

    class OutputProcessor(Processor):
        def do_tracing(self, engine_core_output: Any, req_state: Any, stats: Any) -> None:
            module.instrument_manual(span_name="llm_request", attributes={"vllm": 1})

    module.OutputProcessor = OutputProcessor
    say_more_in_spans(module)
    state = SimpleNamespace(external_req_id="chatcmpl-1")
    for headers in ({"conserve.class": "offline", "conserve.stops": "3"}, None):
        OutputProcessor().do_tracing(SimpleNamespace(trace_headers=headers), state, None)
    module.instrument_manual(span_name="other", attributes={"vllm": 2})
    assert made[0]["attributes"]["conserve.stops"] == 3
    assert made[0]["attributes"]["vllm"] == 1
    assert [span["attributes"] for span in made[1:]] == [{"vllm": 1}, {"vllm": 2}]
