"""What a stoppable step costs the device behind it: learned, and not for ever."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from conserve.core.stop_gap import FRESH_S, HALF_LIFE_S, LEAST_GAPS, LONGEST_GAP_S, StopGap


@dataclass
class Timeline:
    """Steps of 50 ms, one after the other."""

    gap: StopGap = field(default_factory=StopGap)
    now_s: float = 100.0

    def step(self, gap_s: float = 0.0, *, stoppable: bool, work_left: bool = True) -> None:
        """One that begins `gap_s` after the last."""
        launched_s = self.now_s + gap_s
        self.now_s = launched_s + 0.05
        if stoppable:
            self.gap.held_back()
        self.gap.stepped(launched_s, self.now_s, work_left=work_left)

    def measure(self, *gaps_s: float) -> None:
        self.step(stoppable=True)
        for gap_s in gaps_s:
            self.step(gap_s, stoppable=True)


def test_the_gap_behind_stoppable_steps_is_learned() -> None:
    line = Timeline()
    line.measure(*[0.004] * LEAST_GAPS)
    assert line.gap.seconds == pytest.approx(0.004)
    line.measure(*[0.002] * 60)
    assert line.gap.seconds == pytest.approx(0.002, rel=0.02), "the newest count most"


def test_a_few_gaps_are_not_believed() -> None:
    """The first of an engine may be anything."""
    line = Timeline()
    line.measure(0.02, *[0.001] * (LEAST_GAPS - 2))
    assert line.gap.seconds == 0.0
    line.step(0.001, stoppable=True)
    assert line.gap.seconds < 0.005


def test_a_gap_that_is_not_measured_any_more_fades() -> None:
    """What it forbids is what would measure it: it must be tried again."""
    line = Timeline()
    line.measure(*[0.01] * 10)
    line.step(0.01, stoppable=False)
    for _ in range(round(FRESH_S / 0.05) - 1):
        line.step(stoppable=False)
    assert line.gap.seconds > 0.0099
    for _ in range(round(HALF_LIFE_S / 0.05)):
        line.step(stoppable=False)
    assert line.gap.seconds == pytest.approx(0.005, rel=0.01)
    line.measure(0.01)
    assert line.gap.seconds == pytest.approx(0.0055, rel=0.01), "from where it had faded to"


def test_steps_that_are_measured_keep_it_as_it_is() -> None:
    line = Timeline()
    line.measure(*[0.003] * 2000)
    assert line.gap.seconds == pytest.approx(0.003)


def test_a_pause_is_no_gap() -> None:
    line = Timeline()
    line.measure(*[0.004] * LEAST_GAPS)
    line.step(0.004, stoppable=True, work_left=False)
    line.step(3.0, stoppable=True)
    assert line.gap.seconds == pytest.approx(0.004), "nothing was left to run"
    line.step(3.0, stoppable=True)
    assert line.gap.seconds < 0.004 + LONGEST_GAP_S / 5, "somebody else's doing"


def test_behind_steps_that_cannot_be_stopped_there_is_none() -> None:
    line = Timeline()
    for _ in range(100):
        line.step(0.01, stoppable=False)
    assert line.gap.seconds == 0.0
