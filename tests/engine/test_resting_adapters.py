"""Adapters of requests that a step holds back: vLLM does not see them while it schedules."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.plan import Mode, Plan
from conserve.engine.admission import Admission
from tests.engine.engine import make_request, make_scheduler

pytestmark = pytest.mark.engine


def running(folder: Path, max_adapters: int | None) -> Any:
    """A scheduler with two requests that run, of an adapter each where it has any."""
    scheduler = make_scheduler(folder, max_adapters=max_adapters)
    for number in (1, 2):
        adapter = number if max_adapters else 0
        request = make_request(
            f"off-{number}", [number] * 8, 4, online=False, arrival_s=0.0, adapter=adapter
        )
        scheduler.requests[request.request_id] = request
        scheduler.running.append(request)
    return scheduler


def adapters(scheduler: Any) -> list[int]:
    return [r.lora_request.lora_int_id if r.lora_request else 0 for r in scheduler.running]


def test_only_those_of_the_step_are_seen_while_vllm_schedules(tmp_path: Path) -> None:
    """vLLM 0.33 would count two where a step holds one, and end the engine."""
    scheduler = running(tmp_path, max_adapters=1)
    with Admission(scheduler).only(Plan(Mode.OFFLINE, grants={"off-2": 1})):
        assert adapters(scheduler) == [0, 2]
    assert adapters(scheduler) == [1, 2]


def test_they_are_back_where_the_scheduler_fails_or_preempts(tmp_path: Path) -> None:
    scheduler = running(tmp_path, max_adapters=1)
    first = scheduler.running[0]
    with suppress(RuntimeError), Admission(scheduler).only(Plan(Mode.OFFLINE)):
        scheduler.running.remove(first)
        raise RuntimeError
    assert first.lora_request.lora_int_id == 1
    assert adapters(scheduler) == [2]


def test_without_adapters_nothing_is_touched(tmp_path: Path) -> None:
    scheduler = running(tmp_path, max_adapters=None)
    with Admission(scheduler).only(Plan(Mode.OFFLINE)):
        assert adapters(scheduler) == [0, 0]
