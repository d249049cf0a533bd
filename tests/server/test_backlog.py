"""vLLM's own bounds on what it takes, beside offline work that waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from conserve.server.tiers.backlog import bound_by_class
from conserve.server.tiers.inherited import remember
from tests.server.engine_requests import engine_request

pytestmark = pytest.mark.engine

PROMPT = list(range(1, 101))


class Client:
    """vLLM's client of its engine, as far as it decides whom to take."""

    check_admission = AsyncLLM.check_admission
    get_num_queued_tokens = AsyncLLM.get_num_queued_tokens
    get_num_unfinished_requests = AsyncLLM.get_num_unfinished_requests
    _record_admission_rejection = AsyncLLM._record_admission_rejection
    admission_stats = None
    logger_manager = None

    def __init__(self, requests: int | None = None, tokens: int | None = None) -> None:
        self.scheduler_config = SimpleNamespace(
            max_num_queued_reqs=requests, max_num_queued_tokens=tokens
        )
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.num_taken = 0

    def ask(self, priority: int, n: int = 1) -> bool:
        """Whether a client's request of that priority is taken; it then waits."""
        remember(priority)
        try:
            self.check_admission(n)
        except GracefulHTTPError:
            return False
        finally:
            remember(0)
        for _ in range(n):
            self.num_taken += 1
            params = SamplingParams(max_tokens=2, output_kind=RequestOutputKind.FINAL_ONLY)
            params.detokenize = False
            name = f"r{self.num_taken}"
            request = engine_request(name, PROMPT, params)
            request.priority = priority
            queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, name)
            self.output_processor.add_request(request, None, None, 0, queue)
        return True

    def first_token(self, name: str) -> None:
        self.output_processor.process_outputs([EngineCoreOutput(name, [7])])

    def leaves(self, name: str) -> None:
        self.output_processor.abort_requests([name], internal=True)


def client(**bounds: Any) -> Client:
    made = Client(**bounds)
    bound_by_class(made)
    return made


def test_offline_prompts_that_wait_refuse_no_chat() -> None:
    engine = client(tokens=250)
    assert all(engine.ask(priority=10) for _ in range(20))
    assert [engine.ask(priority=0) for _ in range(4)] == [True, True, True, False]
    assert not engine.ask(priority=1), "a backlog of chats is none to add offline work to"
    engine.first_token("r21")
    assert engine.ask(priority=-5)


def test_offline_requests_take_no_chats_place() -> None:
    engine = client(requests=4)
    assert [engine.ask(priority=1) for _ in range(5)] == [True] * 4 + [False]
    assert [engine.ask(priority=0, n=2) for _ in range(3)] == [True, True, False]
    engine.leaves("r1")
    assert not engine.ask(priority=1), "to offline work, all count"
    engine.leaves("r5")
    assert engine.ask(priority=0)


def test_careless_vllm_alone_refuses_chats_for_the_sake_of_offline_work() -> None:
    engine = Client(requests=4, tokens=250)
    assert all(engine.ask(priority=1) for _ in range(3))
    assert not engine.ask(priority=0)


def test_to_do_it_twice_changes_nothing_and_who_has_no_bounds_has_none() -> None:
    engine = client(requests=1)
    first = engine.check_admission
    bound_by_class(engine)
    assert engine.check_admission is first
    bound_by_class(SimpleNamespace(output_processor=engine.output_processor))
    unbounded = client()
    assert "check_admission" not in vars(unbounded)
    assert unbounded.ask(priority=0)
