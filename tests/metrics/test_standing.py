"""Chat's slowdown and the share of the bound, on steps whose truth is known."""

from __future__ import annotations

import pytest

from conserve.core.latency import LatencyModel, StepShape
from conserve.metrics.bound import Bound, Crowd
from conserve.metrics.standing import Standing, Stood

MODEL = LatencyModel(fixed=0.004, per_token=4e-5, per_pair=1e-9, per_context=1e-8, knee=100)
FLAT = LatencyModel(fixed=0.01, per_token=0.0)
"""Every step takes as long, whatever is in it."""
MOST = 1024
NOBODY = StepShape()


def decodes(count: int, context: int = 0) -> StepShape:
    shape = StepShape()
    for _ in range(count):
        shape.add_decode(1, context)
    return shape


def prefill(tokens: int) -> StepShape:
    shape = StepShape()
    shape.add_prefill(tokens, 0)
    return shape


def both(one: StepShape, other: StepShape) -> StepShape:
    return StepShape(
        one.num_tokens + other.num_tokens,
        one.attention_pairs + other.attention_pairs,
        one.num_decodes + other.num_decodes,
        one.decode_context + other.decode_context,
        one.num_prefill_tokens + other.num_prefill_tokens,
    )


class Clock:
    """Plays steps one behind the other, each as long as the model gives it, unless told."""

    def __init__(self, model: LatencyModel = MODEL) -> None:
        self.model = model
        self.standing = Standing()
        self.now_s = 0.0
        self.sums = Stood()
        self.offline_tokens = 0

    def step(
        self,
        online: StepShape = NOBODY,
        offline: StepShape = NOBODY,
        crowd: Crowd = Crowd(),  # noqa: B008  (a constant)
        seconds: float | None = None,
        stopped: bool = False,
    ) -> None:
        seconds = self.model.predict_s(both(online, offline)) if seconds is None else seconds
        self.now_s += seconds
        stood = self.standing.step(
            self.now_s,
            seconds,
            online,
            offline,
            self.model,
            crowd=crowd,
            max_tokens=MOST,
            stopped=stopped,
        )
        self.sums = Stood(*(a + b for a, b in zip(self.sums, stood, strict=True)))
        self.offline_tokens += offline.num_tokens * (not stopped)

    @property
    def slowdown(self) -> float:
        return self.sums.chat_s / self.sums.alone_s

    @property
    def share(self) -> float:
        return self.offline_tokens / self.sums.bound_tokens


def test_whoever_is_alone_is_not_slowed_down_however_slow_the_machine() -> None:
    clock = Clock()
    for _ in range(50):
        clock.step(online=decodes(4, 800), seconds=0.3)
        clock.step(online=prefill(300))
    assert clock.slowdown == pytest.approx(1.0)
    assert clock.sums.bound_tokens == 0


def test_a_gap_is_compared_with_a_step_of_chat_alone() -> None:
    clock, crowd = Clock(), Crowd(1, 10)
    for _ in range(200):
        clock.step(decodes(4), prefill(600), crowd)
    longer = MODEL.predict_s(both(decodes(4), prefill(600))) / MODEL.predict_s(decodes(4))
    assert longer > 3
    assert clock.slowdown == pytest.approx(longer, rel=0.01)


def test_prefills_of_other_chats_are_there_alone_as_well() -> None:
    """Each second has as many; what a decode waits for them alone is their share of the time."""
    clock, crowd = Clock(), Crowd(1, 10)
    for _ in range(100):
        for _ in range(9):
            clock.step(decodes(4), prefill(600), crowd)
        clock.step(both(decodes(4), prefill(600)))
    gap_s = MODEL.predict_s(both(decodes(4), prefill(600)))
    least_s = MODEL.predict_s(decodes(4))
    prefills_s = 0.1 * (gap_s - least_s) / gap_s
    assert clock.slowdown == pytest.approx(gap_s * (1 - prefills_s) / least_s, rel=0.02)


def test_a_stopped_step_takes_time_and_gives_no_token() -> None:
    clock, crowd = Clock(FLAT), Crowd(1, 10)
    for _ in range(200):
        clock.step(decodes(4), prefill(600), crowd)
        clock.step(decodes(4), prefill(600), crowd, stopped=True)
    assert clock.slowdown == pytest.approx(2.0, rel=0.02)


def test_steps_of_decodes_back_to_back_are_the_bound() -> None:
    clock, crowd = Clock(), Crowd(64, 640)
    for _ in range(500):
        clock.step(offline=decodes(64, 500), crowd=crowd)
    assert clock.share == pytest.approx(1.0, abs=0.01)


def test_full_steps_of_prefills_are_the_bound() -> None:
    clock, crowd = Clock(), Crowd(1, 10, num_waiting=5)
    for _ in range(500):
        clock.step(offline=prefill(MOST), crowd=crowd)
    assert clock.share == pytest.approx(1.0, abs=0.01)


def test_full_steps_between_steps_of_decodes_are_the_bound() -> None:
    """Two rounds in three have no prompt to compute: its tokens came all at once."""
    clock, crowd = Clock(), Crowd(64, 640)
    for _ in range(300):
        clock.step(offline=both(decodes(64, 500), prefill(MOST - 64)), crowd=crowd)
        clock.step(offline=decodes(64, 500), crowd=crowd)
        clock.step(offline=decodes(64, 500), crowd=crowd)
    assert clock.share == pytest.approx(1.0, abs=0.02)


def test_half_of_the_time_idle_is_half_of_the_bound() -> None:
    clock, crowd = Clock(), Crowd(64, 640)
    for _ in range(500):
        clock.step(offline=decodes(64, 500), crowd=crowd)
        clock.now_s += MODEL.predict_s(decodes(64, 500))
    assert clock.share == pytest.approx(0.5, abs=0.01)


def test_online_work_is_in_the_bound_s_way_as_well() -> None:
    """Full steps with as many online tokens in each: first come first served has no more."""
    clock, crowd = Clock(), Crowd(1, 10, num_waiting=5)
    for _ in range(500):
        clock.step(prefill(400), prefill(MOST - 400), crowd)
    assert clock.share == pytest.approx(1.0, abs=0.03)


def test_without_offline_work_so_far_none_is_expected() -> None:
    clock = Clock()
    clock.step(online=decodes(4), crowd=Crowd(0, 0, num_waiting=3))
    assert clock.sums.bound_tokens == 0


@pytest.mark.parametrize(("seconds", "leaves_time"), [(0.02, False), (0.2, True)])
def test_chat_that_is_too_much_by_itself_leaves_no_time(seconds: float, leaves_time: bool) -> None:
    """As much comes in so many seconds as takes 45 ms."""
    bound = Bound()
    for _ in range(100):
        bound.passed(seconds, 1.0, Crowd(1, 10))
        bound.computed(prefill(MOST - 1), prefill(1))
    assert (bound.tokens_per_s(MODEL, MOST) > 0) == leaves_time


@pytest.mark.parametrize(
    ("crowd", "would_run"),
    [
        (Crowd(), 0),
        (Crowd(8, 80, num_free_blocks=80, num_free_slots=9), 8),
        (Crowd(8, 80, num_waiting=50, num_free_blocks=45, num_free_slots=9), 12),
        (Crowd(8, 80, num_waiting=50, num_free_blocks=800, num_free_slots=9), 17),
        (Crowd(8, 80, num_waiting=3, num_free_blocks=800, num_free_slots=9), 11),
        (Crowd(0, 0, num_waiting=3, num_free_blocks=800, num_free_slots=9), 0),
    ],
)
def test_who_waits_would_run_where_there_is_room(crowd: Crowd, would_run: float) -> None:
    assert crowd.would_run == would_run
