"""Who listens hears of each request to the engine once, and stands in the way of none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from conserve.server.asked import tell_of_requests
from tests.server.engine_requests import engine_request

pytestmark = pytest.mark.engine


def asked(*, resumable: bool) -> EngineCoreRequest:
    return engine_request("r", [1, 2], SamplingParams(detokenize=False), resumable=resumable)


def test_a_request_whose_input_comes_in_parts_is_one_and_may_end() -> None:
    """As a session of /v1/realtime: vLLM forgets it where the engine is done with it already."""
    processor, heard = OutputProcessor(None, log_stats=False), []

    def told(_processor: Any, request: Any, state: Any) -> None:
        heard.append((request.request_id, state.prompt_len))

    for _ in range(2):
        tell_of_requests(SimpleNamespace(output_processor=processor), told)
    queue = RequestOutputCollector(SamplingParams().output_kind, "r")
    for _ in range(2):
        processor.add_request(asked(resumable=True), None, None, 0, queue)
    processor.request_states["r"].input_chunk_queue = None
    processor.add_request(asked(resumable=False), None, None, 0, queue)
    assert processor.request_states == {}
    assert heard == [("r", 2)]
