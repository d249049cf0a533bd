"""Decaying averages of the online side."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve.core.traffic import TrafficEstimate


def test_before_any_traffic_the_prior_speaks() -> None:
    traffic = TrafficEstimate()
    assert traffic.interruption_rate == pytest.approx(1 / TrafficEstimate.PRIOR_S)
    assert traffic.online_residency == 0.0
    assert traffic.offline_share == 0.0


def test_interruption_rate_is_arrivals_per_offline_only_second() -> None:
    """Poisson arrivals at 2 a second, each followed by 3 s of online work."""
    traffic, chance = TrafficEstimate(), random.Random(3)
    seen = []
    for _ in range(4000):
        traffic.spent(chance.expovariate(2.0), online_resident=False)
        traffic.interrupted()
        traffic.spent(3.0, online_resident=True)
        seen.append(traffic.interruption_rate)
    assert sum(seen[500:]) / 3500 == pytest.approx(2.0, rel=0.05)


def test_the_rate_forgets_in_offline_only_time_and_not_in_online_time() -> None:
    traffic = TrafficEstimate()
    for _ in range(50):
        traffic.spent(0.1, online_resident=False)
        traffic.interrupted()
    rate = traffic.interruption_rate
    traffic.spent(3600.0, online_resident=True)
    assert traffic.interruption_rate == rate
    traffic.spent(600.0, online_resident=False)
    assert traffic.interruption_rate < 0.01 * rate


def test_residency_is_the_share_of_recent_time() -> None:
    traffic = TrafficEstimate()
    for _ in range(3000):
        traffic.spent(0.03, online_resident=True)
        traffic.spent(0.07, online_resident=False)
    assert traffic.online_residency == pytest.approx(0.3, abs=0.07)
    traffic.spent(600.0, online_resident=True)
    assert traffic.online_residency == pytest.approx(1.0, abs=1e-3)


def test_offline_share_is_the_share_of_step_time() -> None:
    traffic = TrafficEstimate()
    for _ in range(2000):
        traffic.stepped(0.05, offline_seconds=0.02)
    assert traffic.offline_share == pytest.approx(0.4)
    for _ in range(20_000):
        traffic.stepped(0.05, offline_seconds=0.0)
    assert traffic.offline_share < 1e-3


@given(st.floats(0.01, 5000.0), st.integers(2, 200), st.booleans(), st.floats(0.0, 1.0))
def test_time_in_pieces_weighs_what_it_weighs_whole(
    seconds: float, pieces: int, online: bool, share: float
) -> None:
    whole, cut = TrafficEstimate(), TrafficEstimate()
    whole.spent(seconds, online_resident=online)
    whole.stepped(seconds, share * seconds)
    for _ in range(pieces):
        cut.spent(seconds / pieces, online_resident=online)
        cut.stepped(seconds / pieces, share * seconds / pieces)
    # To 1e-6: fully decayed pasts differ in their last digits.
    assert cut.interruption_rate == pytest.approx(whole.interruption_rate, rel=1e-6)
    assert cut.online_residency == pytest.approx(whole.online_residency, rel=1e-6)
    assert cut.offline_share == pytest.approx(whole.offline_share, rel=1e-6)


def test_a_long_idle_night_is_forgotten_within_minutes() -> None:
    traffic = TrafficEstimate()
    traffic.spent(8 * 3600.0, online_resident=False)
    for _ in range(120):
        traffic.spent(1.0, online_resident=False)
        traffic.interrupted()
    assert traffic.interruption_rate > 0.8


@given(st.lists(st.tuples(st.floats(0.0, 1e4), st.booleans()), max_size=20))
def test_shares_stay_shares(spells: list[tuple[float, bool]]) -> None:
    traffic = TrafficEstimate()
    for seconds, online in spells:
        traffic.spent(seconds, online_resident=online)
        traffic.stepped(seconds, seconds if online else 0.0)
        assert 0.0 <= traffic.online_residency <= 1.0
        assert 0.0 <= traffic.offline_share <= 1.0 + 1e-9
        assert traffic.interruption_rate >= 0.0
