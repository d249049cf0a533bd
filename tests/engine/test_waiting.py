"""Requests that wait with their blocks: for KV from elsewhere, or for more input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.engine.device import Device, Row, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

MakeEngine = Callable[[], Engine]
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
NUM_LOADED = 8


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make() -> Engine:
        scheduler = make_scheduler(tmp_path)
        made.append(scheduler)
        return Engine(scheduler, Device(BLOCK_SIZE))

    yield make
    for scheduler in made:
        scheduler.shutdown()


def write_remote_kv(engine: Engine, name: str) -> None:
    """What another connector does: fill the blocks it was given."""
    row = Row(list(PROMPT), list(engine.scheduler.kv_cache_manager.get_block_ids(name)))
    for position in range(NUM_LOADED):
        engine.device._write(row, position)


@pytest.mark.parametrize("online", [True, False], ids=["online", "offline"])
def test_a_request_whose_kv_was_loaded_is_served(make_engine: MakeEngine, online: bool) -> None:
    """Beside a connector that loads in the background, as vLLM's MultiConnector may hold."""
    from vllm.v1.outputs import KVConnectorOutput

    engine = make_engine()
    scheduler = engine.scheduler
    loading = {"remote"}
    scheduler.connector.get_num_new_matched_tokens = lambda request, computed: (
        (NUM_LOADED, True) if request.request_id in loading else (0, False)
    )
    engine.add(make_request("remote", PROMPT, 3, online=online, arrival_s=1.0))
    engine.step()
    loading.clear()
    assert len(scheduler.kv_holding_waiting) == 1, "its blocks are being filled"
    engine.add(make_request("other", [1, 2, 3], 2, online=False, arrival_s=2.0))
    engine.step()
    write_remote_kv(engine, "remote")
    output = scheduler.schedule()
    result = engine.device.run(output)
    result.kv_connector_output = KVConnectorOutput(finished_recving={"remote"})
    for client in scheduler.update_from_output(output, result).values():
        for one in client.outputs:
            engine.outputs[one.request_id].extend(one.new_token_ids)
    engine.run(most_steps=100)
    assert engine.outputs["remote"] == expected_output(PROMPT, 3)
    assert engine.outputs["other"] == expected_output([1, 2, 3], 2)
    assert len(scheduler.kv_holding_waiting) == 0


@pytest.mark.parametrize("online", [True, False], ids=["online", "offline"])
def test_a_session_goes_on_when_it_is_told_more(make_engine: MakeEngine, online: bool) -> None:
    """It has arrived anew then, while it is queued."""
    engine = make_engine()

    def tell(tokens: list[int], num_output: int, *, more: bool = True) -> None:
        now_s = engine.scheduler.clock.now_s
        request = make_request("talk", tokens, num_output, online=online, arrival_s=now_s)
        request.resumable = more
        engine.scheduler.add_request(request)
        for _ in range(20):
            engine.step()

    engine.outputs["talk"] = []
    tell(list(PROMPT), 3)
    assert len(engine.scheduler.kv_holding_waiting) == 1, "it waits for more input"
    first = expected_output(PROMPT, 3)
    tell([21, 22], 2)
    # The last token of an answer is no part of what follows.
    second = expected_output([*PROMPT, *first[:-1], 21, 22], 2)
    tell([], 1, more=False)
    assert engine.outputs["talk"] == first + second
    assert not engine.scheduler.requests
