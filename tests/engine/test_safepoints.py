"""Safepoints of one forward: where they are, what they cost, how far the host runs ahead."""

from __future__ import annotations

from pathlib import Path

import pytest

from conserve.engine.flag import StopFlag
from conserve.engine.safepoints import RUN_AHEAD, Safepoints, StopStep


class Watched(StopFlag):
    """Notes every (step, safepoint) that a rank looked at."""

    def __init__(self, folder: Path) -> None:
        super().__init__("test", str(folder))
        self.looks: list[tuple[int, int]] = []

    def lead(self, step: int, point: int) -> bool:
        self.looks.append((step, point))
        return super().lead(step, point)


@pytest.fixture
def flag(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def forward(safepoints: Safepoints, num_layers: int = 12) -> int:
    """Layers done."""
    try:
        for _ in range(num_layers):
            safepoints.at_layer()
    except StopStep as stop:
        return stop.layers_done
    return num_layers


@pytest.mark.parametrize("every", [1, 3, 5, 12, 50])
def test_every_kth_layer_is_a_safepoint_and_the_first_one(flag: Watched, every: int) -> None:
    safepoints = Safepoints(flag, rank=0)
    safepoints.begin(7, every)
    assert forward(safepoints) == 12
    assert flag.looks == [(7, layer) for layer in range(0, 12, every)]


def test_a_layer_count_below_one_means_every_layer(flag: Watched) -> None:
    safepoints = Safepoints(flag, rank=0)
    safepoints.begin(7, 0)
    forward(safepoints, 3)
    assert flag.looks == [(7, 0), (7, 1), (7, 2)]


def test_outside_of_a_stoppable_step_nobody_looks(flag: Watched) -> None:
    safepoints = Safepoints(flag, rank=0)
    assert forward(safepoints) == 12
    safepoints.begin(1, 1)
    safepoints.end()
    flag.raise_for(1)
    assert forward(safepoints) == 12
    assert flag.looks == []


def test_a_raised_flag_stops_at_the_next_safepoint(flag: Watched) -> None:
    safepoints = Safepoints(flag, rank=0)
    safepoints.begin(3, 4)
    for _ in range(6):
        safepoints.at_layer()
    flag.raise_for(3)
    safepoints.at_layer()
    safepoints.at_layer()
    with pytest.raises(StopStep) as stopped:
        safepoints.at_layer()
    assert stopped.value.layers_done == 8
    assert forward(safepoints) == 12, "the stop ended the step's safepoints"


def test_each_step_counts_its_own_layers(flag: Watched) -> None:
    safepoints = Safepoints(flag, rank=0)
    for step in (1, 2):
        safepoints.begin(step, 5)
        forward(safepoints, 7)
        safepoints.end()
    assert flag.looks == [(1, 0), (1, 5), (2, 0), (2, 5)]


def test_another_rank_takes_the_leaders_word(flag: Watched) -> None:
    leader, follower = Safepoints(flag, rank=0), Safepoints(flag, rank=1)
    for safepoints in (leader, follower):
        safepoints.begin(1, 1)
    leader.at_layer()
    follower.at_layer()
    flag.raise_for(1)
    for safepoints in (leader, follower):
        with pytest.raises(StopStep) as stopped:
            safepoints.at_layer()
        assert stopped.value.layers_done == 1


class FakeDevice:
    """Counts the events it was given and has not been waited for."""

    def __init__(self) -> None:
        self.recorded = 0
        self.waited_for = 0
        self.most_ahead = 0

    def event(self) -> FakeEvent:
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device, self.number = device, 0

    def record(self) -> None:
        self.device.recorded += 1
        self.number = self.device.recorded

    def synchronize(self) -> None:
        assert self.number == self.device.waited_for + 1, "events are waited for in order"
        device = self.device
        device.most_ahead = max(device.most_ahead, device.recorded - device.waited_for)
        device.waited_for = self.number


def test_the_host_never_runs_far_ahead_of_the_device(flag: Watched) -> None:
    device = FakeDevice()
    safepoints = Safepoints(flag, rank=0, make_event=device.event)
    assert forward(safepoints) == 12
    assert device.recorded == 0, "outside of stoppable steps no event is paid for"
    for step in (1, 2):
        before = device.recorded
        safepoints.begin(step, 2)
        forward(safepoints, 20)
        assert device.recorded - before == 10
        assert device.recorded - device.waited_for == RUN_AHEAD
        safepoints.end()
        device.waited_for = device.recorded  # the step's own end waits for the device
    assert device.most_ahead == RUN_AHEAD + 1


def test_without_a_bound_the_check_above_would_fail(
    flag: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: events that nobody waits for."""
    monkeypatch.setattr(FakeEvent, "synchronize", lambda self: None)
    device = FakeDevice()
    safepoints = Safepoints(flag, rank=0, make_event=device.event)
    safepoints.begin(1, 2)
    forward(safepoints, 20)
    assert device.recorded - device.waited_for > RUN_AHEAD
