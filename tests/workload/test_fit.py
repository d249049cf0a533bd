"""A scenario on machines of other speeds: as busy, with requests and targets that suit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conserve.bench.selection import SCENARIOS
from conserve.workload import Scenario, Workload, build_workload, load_scenario
from conserve.workload.fit import Fit

FOR_SERVERS = sorted(f for f in SCENARIOS.glob("*.toml") if not f.stem.startswith("paper-"))
SCALES = [0.04, 0.2, 0.25, 0.7, 1.0, 10.0]


def scenario(name: str) -> Scenario:
    return load_scenario(SCENARIOS / f"{name}.toml")


def offered(workload: Workload, duration_s: float) -> float:
    """Tokens a second of the online requests."""
    tokens = (plan.num_prompt_tokens + plan.num_output_tokens for plan in workload.online)
    return sum(tokens) / duration_s


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("file", FOR_SERVERS, ids=lambda file: file.stem)
def test_every_scenario_of_ours_is_good_at_every_scale(file: Path, scale: float) -> None:
    fitted = load_scenario(file).at_scale(scale)
    for at in fitted.places().values():
        assert Scenario.model_validate(at.model_dump(mode="json")) == at
        if not at.trace_names():
            assert build_workload(at, 1, {}).offline


@pytest.mark.parametrize("name", ["acceptance", "quick", "scarce"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_machine_is_as_busy_as_the_scenario_means(name: str, scale: float) -> None:
    own, fitted = scenario(name), scenario(name).at_scale(scale)
    before = offered(build_workload(own, 1, {}), own.duration_s)
    after = offered(build_workload(fitted, 1, {}), fitted.duration_s) / scale
    assert after == pytest.approx(before, rel=0.15)


def test_scale_1_is_the_scenario_itself() -> None:
    own = scenario("gamma")
    assert own.at_scale(1.0) is own
    assert own._fitted(Fit.to_scale(1.0)) == own


def test_a_slower_machine_gets_shorter_requests_before_slower_ones() -> None:
    laptop, slowest = scenario("acceptance").at_scale(0.25), scenario("acceptance").at_scale(0.05)
    (short, shortest) = (build_workload(s, 1, {}) for s in (laptop, slowest))
    assert (laptop.duration_s, slowest.duration_s) == (60, 300)
    for workload in (short, shortest):
        assert len(workload.online) == 55
        assert {p.num_prompt_tokens for p in workload.online} == {40}
        assert {p.num_prompt_tokens for p in workload.offline} == {300}
    assert (laptop.targets.ttft_ms, laptop.targets.tbt_ms) == (1000, 400)
    assert (slowest.targets.ttft_ms, slowest.targets.tbt_ms) == (5000, 1000)


def test_a_faster_machine_gets_the_same_requests_more_often() -> None:
    fast = scenario("acceptance").at_scale(4.0)
    workload = build_workload(fast, 1, {})
    assert (fast.duration_s, len(workload.online), len(workload.offline)) == (60, 220, 1600)
    assert {p.num_prompt_tokens for p in workload.online} == {160}
    assert (fast.targets.ttft_ms, fast.targets.tbt_ms) == (500, 100)


def test_where_lengths_are_the_point_a_slower_machine_takes_longer() -> None:
    own, slow = scenario("scarce"), scenario("scarce").at_scale(0.25)
    assert slow.duration_s == 4 * own.duration_s
    assert build_workload(slow, 1, {}).offline[7].num_prompt_tokens > 500


def test_a_sweep_is_fitted_at_each_point() -> None:
    fitted = scenario("gamma").at_scale(4.0)
    rates = [fitted.at(point).online for point in fitted.points]
    found: list[Any] = [online.arrivals for online in rates if online]
    assert [(a.rate_rps, a.cv) for a in found] == [(2, 2), (4, 2), (6.4, 2), (4, 4)]
    assert [point.x for point in fitted.points] == [2, 4, 6.4, 4]


@pytest.mark.parametrize("scale", SCALES)
def test_targets_keep_their_distance_from_what_a_request_takes_alone(scale: float) -> None:
    """A prompt takes tokens / scale as long as it did, and a decode step at most 1 / sqrt(scale)
    where memory differs less than arithmetic."""
    fit = Fit.to_scale(scale)
    assert fit.ttft >= fit.tokens / scale - 1e-9
    assert fit.tbt >= fit.time - 1e-9
    assert fit.tbt >= scale**-0.5 - 1e-9
