"""Grants cut what vLLM computes only where a cut may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.settings import PolicySettings
from conserve.engine.cutting import part_of
from conserve.engine.door import RequestStatus
from conserve.engine.settings import EngineSettings
from tests.engine.device import Device, expected_output
from tests.engine.engine import BLOCK_SIZE, Engine, make_request, make_scheduler

pytestmark = pytest.mark.engine

IMAGES = ((10, 20), (40, 5))
"""(first token, length) of each image of a prompt."""


def scheduler(**changes: Any) -> Any:
    values = {
        "enable_chunked_prefill": True,
        "disable_chunked_mm_input": False,
        "num_sampled_tokens_per_step": 1,
    } | changes
    part = SimpleNamespace(**values)
    part.vllm_config = part.scheduler_config = part
    return part


def request(status: Any = RequestStatus.WAITING, num_tokens: int = 100) -> Any:
    media = [
        SimpleNamespace(mm_position=SimpleNamespace(offset=first, length=length))
        for first, length in IMAGES
    ]
    return SimpleNamespace(status=status, num_tokens=num_tokens, mm_features=media)


@pytest.mark.parametrize("granted", [0, 1, 37, 60, 200])
def test_text_is_cut_anywhere(granted: int) -> None:
    for status in (RequestStatus.WAITING, RequestStatus.RUNNING):
        assert part_of(granted, scheduler(), request(status), 0, 60) == min(granted, 60)


@pytest.mark.parametrize("status", [RequestStatus.WAITING, RequestStatus.PREEMPTED])
def test_a_model_that_takes_whole_prompts_gets_all_or_nothing(status: Any) -> None:
    whole = scheduler(enable_chunked_prefill=False)
    assert part_of(32, whole, request(status), 0, 100) == 100
    assert part_of(0, whole, request(status), 0, 100) == 0


def test_a_canvas_is_not_cut() -> None:
    canvas = scheduler(num_sampled_tokens_per_step=0)
    assert part_of(3, canvas, request(RequestStatus.RUNNING), 100, 64) == 64


@pytest.mark.parametrize(
    ("computed", "granted", "expected"),
    [
        (0, 5, 5),  # before the first image
        (0, 10, 10),  # up to it
        (0, 15, 10),  # inside it: not begun
        (0, 30, 30),  # behind it
        (0, 42, 40),  # inside the second
        (10, 1, 20),  # the image comes first: all of it, or the request never gets on
        (10, 31, 30),  # inside the second, seen from the first
        (40, 2, 5),
        (45, 2, 2),
    ],
)
def test_an_image_is_not_cut(computed: int, granted: int, expected: int) -> None:
    """Its tokens attend to one another (vLLM then sets `disable_chunked_mm_input` itself)."""
    engine = scheduler(disable_chunked_mm_input=True)
    for status in (RequestStatus.WAITING, RequestStatus.RUNNING):
        assert part_of(granted, engine, request(status), computed, 100 - computed) == expected


def test_a_cut_inside_an_image_stays_within_what_vllm_wants() -> None:
    engine = scheduler(disable_chunked_mm_input=True)
    assert part_of(3, engine, request(), 10, 12) == 12


MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[Any] = []

    def make(*, chunked: bool) -> Engine:
        policy = PolicySettings(fixed_step_tokens=16)
        settings = EngineSettings(profile_seconds=0, policy=policy)
        scheduler = make_scheduler(tmp_path, max_step_tokens=64, settings=settings)
        scheduler.scheduler_config.enable_chunked_prefill = chunked
        made.append(scheduler)
        return Engine(scheduler, Device(BLOCK_SIZE))

    yield make
    for scheduler in made:
        scheduler.shutdown()


@pytest.mark.parametrize("chunked", [True, False])
def test_prompts_in_the_real_scheduler(make_engine: MakeEngine, chunked: bool) -> None:
    """A plan of 16 tokens a step; a prompt of 50 is computed in one where it must be."""
    engine = make_engine(chunked=chunked)
    prompt = list(range(1, 51))
    engine.add(make_request("one", prompt, 3, online=False, arrival_s=1000.0))
    steps = engine.run()
    assert engine.outputs["one"] == expected_output(prompt, 3)
    assert (steps == 3) is not chunked
