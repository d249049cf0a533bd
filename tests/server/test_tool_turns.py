"""vLLM's own loop of tool calls asks of the engine in the class of its response, every turn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

from conserve.server.tiers.inherited import inherit, remember

pytestmark = [pytest.mark.engine, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Engine:
    """Notes the priorities that it is asked with."""

    def __init__(self) -> None:
        self.priorities: list[int] = []

    async def generate(self, *_: Any, priority: int = 0, **__: Any) -> AsyncIterator[Any]:
        self.priorities.append(priority)
        yield SimpleNamespace(metrics=None)


class Context:
    """Of a response whose model calls a tool three times."""

    turns_left = 3

    def append_output(self, output: Any) -> None: ...
    def append_tool_output(self, output: Any) -> None: ...
    async def call_tool(self) -> None: ...

    def need_builtin_tool_call(self) -> bool:
        self.turns_left -= 1
        return self.turns_left >= 0


async def turns(engine: Engine, priority: int) -> list[int]:
    serving: Any = object.__new__(OpenAIServingResponses)
    serving.engine_client, serving.model_config = engine, SimpleNamespace(max_model_len=64)
    serving._log_inputs = lambda *_, **__: None
    context: Any = Context()
    generator = serving._generate_with_builtin_tools("r", {}, None, context, priority=priority)
    async for _ in generator:
        pass
    return engine.priorities


@pytest.mark.parametrize("priority", [0, 1, 3])
async def test_no_turn_leaves_the_class_of_its_response(priority: int) -> None:
    engine = Engine()
    inherit(engine)
    remember(priority)
    priorities = await turns(engine, priority)
    assert len(priorities) == 4
    assert {asked > 0 for asked in priorities} == {priority > 0}


async def test_vllm_itself_makes_later_turns_online() -> None:
    """The negative control: without us."""
    assert await turns(Engine(), 1) == [1, 0, 0, 0]
