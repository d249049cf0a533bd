"""Block diffusion: requests with canvases narrower than the model's."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from conserve.engine import canvases
from conserve.engine.door import DiffusionAsyncScheduler
from conserve.engine.scheduler import ConserveScheduler
from conserve.engine.step_times import StepTimes
from tests.engine.engine import make_request, make_scheduler

pytestmark = pytest.mark.engine

CANVAS = 8
MakeScheduler = Callable[[], Any]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeScheduler]:
    made: list[Any] = []

    def make() -> Any:
        made.append(make_scheduler(tmp_path, async_scheduling=True, canvas=CANVAS))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.shutdown()


def widths(scheduler: Any) -> list[int]:
    """Of the canvases in the step behind the prompts': one request wants half of the model's."""
    for name, own in (("whole", {}), ("half", {"diffusion_canvas_length": CANVAS // 2})):
        request = make_request(name, [1, 2, 3], 40, online=True, arrival_s=1.0, extra_args=own)
        scheduler.add_request(request)
    scheduler.schedule()
    output = scheduler.schedule()
    return [len(output.scheduled_spec_decode_tokens[name]) for name in ("whole", "half")]


def test_a_canvas_is_as_wide_as_its_request_wants(make: MakeScheduler) -> None:
    assert widths(make()) == [CANVAS, CANVAS // 2]


def test_vllms_common_scheduler_knows_one_width(
    make: MakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    monkeypatch.setattr("conserve.engine.scheduler.fitting", lambda kind, config: kind)
    assert widths(make()) == [CANVAS, CANVAS]


NUM_LOOKS = 3
"""Steps that the pretend model needs for a canvas."""


def write(scheduler: Any, output: Any, looks: dict[str, int]) -> Any:
    """What the model answers to a step: nothing, until a canvas is good."""
    names, written = list(output.num_scheduled_tokens), []
    for name in names:
        width = len(output.scheduled_spec_decode_tokens.get(name, ()))
        looks[name] = looks.get(name, 0) + bool(width)
        is_good = bool(width) and looks[name] % NUM_LOOKS == 0
        written.append([7] * width if is_good else [])
    at_s = scheduler.clock.now_s
    result = ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, written)
    result.step_times = StepTimes(at_s, at_s)
    return result


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_both_classes_write_their_canvases_to_the_end(make: MakeScheduler, depth: int) -> None:
    scheduler = make()
    scheduler.scheduler_config.async_scheduling = depth > 1
    for i in range(4):
        request = make_request(f"{i}", [1, 2, 3, i], 24, online=i < 2, arrival_s=float(i))
        scheduler.add_request(request)
    flying: deque[Any] = deque()
    looks: dict[str, int] = {}
    outputs: dict[str, list[int]] = defaultdict(list)
    for _ in range(300):
        if not scheduler.has_requests() and not flying:
            break
        scheduler.clock.now_s += 0.01
        flying.append(scheduler.schedule())
        if len(flying) == depth:
            output = flying.popleft()
            result = write(scheduler, output, looks)
            for client in scheduler.update_from_output(output, result).values():
                for one in client.outputs:
                    outputs[one.request_id] += one.new_token_ids
            names = list(output.num_scheduled_tokens)
            if depth == 1 and names:
                drafts = [[7] * CANVAS for _ in names]
                scheduler.update_draft_token_ids(DraftTokenIds(names, drafts))
    assert outputs == {f"{i}": [7] * 24 for i in range(4)}
    assert not scheduler.requests


def test_models_without_canvases_have_ours_as_it_is() -> None:
    plain = SimpleNamespace(diffusion_config=None)
    assert canvases.fitting(ConserveScheduler, plain) is ConserveScheduler
    kind = canvases.fitting(ConserveScheduler, SimpleNamespace(diffusion_config=object()))
    assert issubclass(kind, ConserveScheduler)
    assert issubclass(kind, DiffusionAsyncScheduler)
