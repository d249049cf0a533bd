"""The steps of the start-up profile stay within what the engine can run."""

from __future__ import annotations

from itertools import islice

import pytest

from conserve.engine.profile_script import CPU_REACH, GPU_REACH, Point, Reach, script

ROUNDS = 100


@pytest.mark.parametrize("reach", [CPU_REACH, GPU_REACH], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("most_tokens", "num_slots"), [(16, 2), (256, 8), (2048, 64), (8192, 256)])
def test_no_step_is_larger_than_the_engine_takes(
    reach: Reach, most_tokens: int, num_slots: int
) -> None:
    points = list(islice(script(reach, most_tokens, num_slots), ROUNDS))
    assert len(points) == ROUNDS, "it goes round until the time is up"
    for point in points:
        assert sum(point.prompts) + (point.num_decodes if point.prompts else 0) <= most_tokens
        assert point.num_decodes < num_slots


def test_a_gpu_is_profiled_up_to_its_largest_step_and_a_cpu_is_not() -> None:
    def largest(reach: Reach) -> int:
        return max(sum(point.prompts) for point in islice(script(reach, 8192, 256), ROUNDS))

    assert largest(GPU_REACH) == 8192
    assert largest(CPU_REACH) == 1024


def test_every_kind_of_step_is_in_it() -> None:
    points = list(islice(script(GPU_REACH, 8192, 256), ROUNDS))
    assert any(point.prompts and point.num_decodes for point in points)
    assert any(len(point.prompts) > 1 for point in points)
    assert Point(num_decodes=128) in points
