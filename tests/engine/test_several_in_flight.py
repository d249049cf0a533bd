"""Several steps in flight, as the stages of a pipeline have them, and what is handed on of requests
that leave meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.plan import Mode, Plan
from conserve.engine.door import AsyncScheduler
from conserve.engine.scheduler import ConserveScheduler
from conserve.engine.tracker import RequestTracker
from tests.engine.device import Device, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

PROMPT = [3 + i for i in range(19)]


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Engine]:
    """Two stages, and a runner that does not take steps ahead of their tokens: Model Runner V1."""
    scheduler = make_scheduler(tmp_path, async_scheduling=False)
    yield Engine(scheduler, Device(BLOCK_SIZE), depth=2)
    scheduler.shutdown()


def num_unknown(engine: Engine) -> int:
    """Tokens that steps were to compute and that nobody knew when they were scheduled."""
    engine.add(make_request("on", PROMPT, 6, online=True, arrival_s=1.0))
    engine.add(make_request("off", PROMPT[::-1], 6, online=False, arrival_s=1.0))
    schedule, requests, unknown = engine.scheduler.schedule, engine.scheduler.requests, 0

    def watched() -> Any:
        nonlocal unknown
        output = schedule()
        for name in output.num_scheduled_tokens:
            request = requests[name]
            unknown += max(0, request.num_computed_tokens - request.num_tokens)
        return output

    engine.scheduler.schedule = watched
    engine.run()
    assert engine.outputs == {
        "on": expected_output(PROMPT, 6),
        "off": expected_output(PROMPT[::-1], 6),
    }
    return unknown


def test_no_stage_computes_a_token_that_the_last_has_not_sampled(pipeline: Engine) -> None:
    assert num_unknown(pipeline) == 0


def test_vllms_other_scheduler_is_caught(pipeline: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: placeholders stand for tokens that the runner has by itself."""
    for name in ("_update_after_schedule", "_update_request_with_output"):
        monkeypatch.setattr(ConserveScheduler, name, getattr(AsyncScheduler, name))
    assert num_unknown(pipeline) > 0


@pytest.fixture
def staggered(tmp_path: Path) -> Iterator[Engine]:
    """Two stages, and a runner that takes a request's steps ahead of its tokens, but not one right
    behind the other: Model Runner V2."""
    scheduler = make_scheduler(tmp_path, async_scheduling=True, num_blocks=128)
    scheduler.use_v2_model_runner, scheduler.decode_stagger = True, 2
    yield Engine(scheduler, Device(BLOCK_SIZE), depth=3)
    scheduler.shutdown()


def left_out(engine: Engine) -> set[str]:
    """Running requests whose tokens were planned and not taken into the step."""
    for i in range(8):
        engine.add(make_request(f"{i}", [i + 1] * 7, 30, online=i < 2, arrival_s=1.0))
    schedule, left = engine.scheduler.schedule, set[str]()

    def watched() -> Any:
        names = {request.request_id for request in engine.scheduler.running}
        output = schedule()
        planned = set(list(engine.scheduler.driver.steps)[-1].plan.grants)
        left.update(planned & names - set(output.num_scheduled_tokens))
        return output

    engine.scheduler.schedule = watched
    engine.run()
    assert engine.outputs == {f"{i}": expected_output([i + 1] * 7, 30) for i in range(8)}
    return left


def test_nobody_is_planned_whose_token_is_with_a_later_stage(staggered: Engine) -> None:
    """What it would take of the step is others'."""
    assert not left_out(staggered)


def test_a_plan_with_them_is_caught(staggered: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    running = RequestTracker.running
    monkeypatch.setattr(RequestTracker, "running", lambda self, rs, step: running(self, rs))
    assert left_out(staggered)


@pytest.fixture
def handing_on(tmp_path: Path) -> Iterator[Engine]:
    """Beside a connector that hands the KV of a request on when it ends."""
    theirs = {"kv_connector": "NotingConnector", "kv_role": "kv_producer"}
    theirs["kv_connector_module_path"] = "tests.engine.test_beside"
    scheduler = make_scheduler(tmp_path, async_scheduling=True, their_connector=theirs)
    yield Engine(scheduler, Device(BLOCK_SIZE), depth=2)
    scheduler.shutdown()


def test_nobody_is_handed_on_without_kv(handing_on: Engine) -> None:
    """A displaced request whose last token is in flight has no blocks when that comes."""
    engine, scheduler = handing_on, handing_on.scheduler
    handed_on = []
    finished = scheduler.connector.request_finished_all_groups

    def watched(request: Any, block_ids: Any) -> Any:
        handed_on.append(sum(len(ids) for ids in block_ids))
        return finished(request, block_ids)

    scheduler.connector.request_finished_all_groups = watched
    engine.add(make_request("off", PROMPT, 1, online=False, arrival_s=1.0))
    engine.step()
    (request,) = scheduler.running
    assert request.num_in_flight_tokens == len(PROMPT)
    planner = scheduler.driver.planner
    scheduler.driver.planner = lambda *_: Plan(Mode.IDLE, displace=["off"])
    engine.step()
    assert not scheduler.running
    scheduler.driver.planner = planner
    engine.run()
    assert engine.outputs["off"] == expected_output(PROMPT, 1)
    assert handed_on == [-(-len(PROMPT) // BLOCK_SIZE)]
