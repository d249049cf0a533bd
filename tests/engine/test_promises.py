"""Targets on their way from the engine to an API process, by vLLM's own utility calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.latency import LatencyModel
from conserve.core.snapshot import Targets
from conserve.engine.promises import TARGETS_METHOD, Promises, ask_targets, told_targets
from conserve.engine.settings import EngineSettings
from conserve.metrics.machine_targets import ChosenTargets
from tests.engine.engine import make_scheduler

pytestmark = pytest.mark.engine

SLOW = LatencyModel(0.05, 1e-3)


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Any]:
    made = make_scheduler(tmp_path)
    yield made
    made.shutdown()


class Client:
    """Asks a core of another process: what vLLM sends is encoded and decoded by vLLM."""

    def __init__(self, core: Any) -> None:
        self._core = core

    async def call_utility_async(self, method: str) -> Any:
        from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
        from vllm.v1.engine.core import EngineCoreProc
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        assert method == TARGETS_METHOD
        sent: list[UtilityOutput] = []
        output, core = UtilityOutput(1), self._core
        EngineCoreProc._invoke_utility_method(
            method, lambda: told_targets(core), output, sent.append
        )
        frames = MsgpackEncoder().encode(EngineCoreOutputs(utility_output=sent[0]))
        answer = MsgpackDecoder(EngineCoreOutputs).decode(frames).utility_output
        assert answer.failure_message is None
        return answer.result.result


def asked(core: Any, settings: EngineSettings | None = None) -> ChosenTargets:
    client = SimpleNamespace(engine_core=Client(core))
    return asyncio.run(ask_targets(client, settings or EngineSettings()))


def test_an_api_process_hears_what_the_machine_gave(scheduler: Any) -> None:
    core = SimpleNamespace(scheduler=scheduler)
    assert asked(core).targets == Targets(), "before it is measured"
    scheduler.promises.measured(SLOW)
    assert asked(core) == scheduler.promises.chosen
    assert asked(core).targets == Targets(2.5, 0.3)


def test_an_engine_without_our_scheduler_has_none_of_its_own() -> None:
    named = EngineSettings(slo_ttft_s=0.7)
    assert asked(SimpleNamespace(scheduler=object()), named) == named.targets_on(None)
    assert asyncio.run(ask_targets(object(), named)).targets.ttft_s == 0.7


def test_the_engine_can_be_asked() -> None:
    from conserve.engine import door, plugin

    plugin.register()
    core = SimpleNamespace(scheduler=SimpleNamespace(promises=Promises(EngineSettings())))
    assert getattr(door.EngineCore, TARGETS_METHOD)(core)[:2] == [1.0, 0.2]
