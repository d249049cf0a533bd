"""The alarm: a real thread, and a clock that moves only when told."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator

import pytest

from conserve.engine.alarm import Alarm

PATIENCE_S = 60.0
"""Longer than any machine holds a thread up."""


class Bell:
    """Where the alarm rings, and the clock that it reads."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.rung: list[float] = []
        self.rang = threading.Semaphore(0)
        self.num_looks = 0

    def clock(self) -> float:
        self.num_looks += 1
        return self.now_s

    def ring(self) -> None:
        self.rung.append(self.now_s)
        self.rang.release()

    def wait_for_looks(self, num: int) -> None:
        """Until the alarm's thread has read the clock so often again."""
        wanted, give_up_s = self.num_looks + num, time.monotonic() + PATIENCE_S
        while self.num_looks < wanted:
            assert time.monotonic() < give_up_s
            time.sleep(1e-3)


@pytest.fixture
def bell() -> Bell:
    return Bell()


@pytest.fixture
def alarm(bell: Bell) -> Iterator[Alarm]:
    alarm = Alarm(bell.clock, bell.ring)
    yield alarm
    alarm.close()


def test_it_rings_once_and_not_before_its_time(alarm: Alarm, bell: Bell) -> None:
    for i in range(3):
        alarm.set(bell.now_s + 0.01)
        bell.wait_for_looks(3)
        assert len(bell.rung) == i
        bell.now_s += 0.02
        assert bell.rang.acquire(timeout=PATIENCE_S)
    bell.now_s += 1.0
    alarm.close()
    assert bell.rung == pytest.approx([0.02, 0.04, 0.06])


def test_a_sooner_moment_wakes_it(alarm: Alarm, bell: Bell) -> None:
    alarm.set(1000 * PATIENCE_S)
    bell.wait_for_looks(1)
    bell.now_s = 0.02
    alarm.set(0.01)
    assert bell.rang.acquire(timeout=PATIENCE_S)


def test_a_moment_may_be_put_off(alarm: Alarm, bell: Bell) -> None:
    alarm.set(0.01)
    alarm.set(0.03)
    bell.now_s = 0.02
    bell.wait_for_looks(3)
    assert bell.rung == []
    bell.now_s = 0.04
    assert bell.rang.acquire(timeout=PATIENCE_S)


def test_it_is_switched_off(alarm: Alarm, bell: Bell) -> None:
    alarm.set(0.01)
    bell.wait_for_looks(1)
    alarm.set(math.inf)
    bell.now_s = 1.0
    alarm.set(1.01)
    bell.now_s = 2.0
    assert bell.rang.acquire(timeout=PATIENCE_S)
    alarm.close()
    assert bell.rung == [2.0], "only the last moment rings"


def test_it_may_be_set_by_whom_it_calls(bell: Bell) -> None:
    def again() -> None:
        bell.ring()
        if len(bell.rung) < 3:
            own.set(bell.now_s)

    own = Alarm(bell.clock, again)
    own.set(0.0)
    for _ in range(3):
        assert bell.rang.acquire(timeout=PATIENCE_S)
    own.close()
    assert len(bell.rung) == 3


def test_nothing_to_wait_for_wakes_nobody(bell: Bell) -> None:
    """The thread reads the clock when a moment is set or has come, and there is none before the
    first."""
    own = Alarm(bell.clock, bell.ring)
    for _ in range(100):
        own.set(math.inf)
    assert own._thread is None
    own.set(1000 * PATIENCE_S)
    bell.wait_for_looks(1)
    for i in range(100):
        own.set(math.inf)
        own.set((2000 + i) * PATIENCE_S)
    own.close()
    assert bell.num_looks == 1


def test_once_closed_it_rings_no_more(alarm: Alarm, bell: Bell) -> None:
    alarm.set(PATIENCE_S)
    alarm.close()
    bell.now_s = 2 * PATIENCE_S
    alarm.set(PATIENCE_S)
    assert alarm._thread is not None
    assert not alarm._thread.is_alive()
    assert bell.rung == []
    alarm.close()
