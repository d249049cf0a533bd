"""What an engine says of where it stands, beside the truth: runs without offline work, and without
regard for chat, of the same arrivals."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random

import pytest

from conserve.core.settings import PolicySettings
from conserve.metrics import RunSummary, summarise
from conserve.sim.arms import ARMS, Arm
from conserve.sim.profiles import Profile
from conserve.sim.run import Outcome, simulate
from conserve.workload import RequestPlan, Workload
from tests.sim.sim_world import COST, MACHINE, TARGETS, WINDOW

ROOMY = replace(MACHINE, num_blocks=2400, max_running=64)
"""Memory for more than a handful: where it is not, first come first served loses work to
preemptions, which the bound does not know of."""
LOADS = {
    "documents": ((300, 3000), (5, 60), 100),
    "stories": ((20, 300), (50, 300), 100),
    "few": ((100, 1500), (20, 90), 4),
}
"""Lengths of the prompts and answers of offline requests, and how many are in flight."""
SETTINGS = {
    "greedy": PolicySettings(),
    "gentle": PolicySettings(min_slack_fill=0.2, stoppable_slack_fill=0.2),
}
RATE_RPS = 6.0
SLOWDOWN_ERROR, SHARE_ERROR = 0.06, 0.08


@cache
def work(load: str) -> Workload:
    rng, now_s, online = Random(3), -WINDOW.lead_in_s, list[RequestPlan]()
    while (now_s := now_s + rng.expovariate(RATE_RPS)) < WINDOW.duration_s:
        lengths = rng.randint(8, 500), rng.randint(20, 80)
        online.append(RequestPlan(f"online-{len(online)}", True, now_s, *lengths))
    prompts, answers, in_flight = LOADS[load]
    offline = [
        RequestPlan(f"offline-{i}", False, -2.0, rng.randint(*prompts), rng.randint(*answers))
        for i in range(4000)
    ]
    return Workload(online, offline, in_flight)


@cache
def played(load: str, arm: str, setting: str = "greedy") -> tuple[Outcome, RunSummary]:
    named = ARMS[arm]
    if not named.stock:
        named = Arm(arm, named.shows, offline=named.offline, settings=SETTINGS[setting])
    profile = Profile("test", "made up", ROOMY, COST)
    outcome = simulate(work(load), named, profile, TARGETS, WINDOW, seed=1)
    return outcome, summarise(outcome.records, WINDOW.duration_s, TARGETS)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("load", LOADS)
def test_what_it_says_is_nearly_so(load: str, setting: str) -> None:
    says, shows = played(load, "conserve", setting)
    _, alone = played(load, "online-only")
    _, bound = played(load, "fcfs")
    assert shows.tbt_mean_s is not None
    assert alone.tbt_mean_s is not None
    truth = shows.tbt_mean_s / alone.tbt_mean_s
    assert says.chat_slowdown == pytest.approx(truth, rel=SLOWDOWN_ERROR)
    assert says.harvest_share == pytest.approx(
        shows.offline_tps / bound.offline_tps, abs=SHARE_ERROR
    )


def test_the_loads_tell_guesses_from_predictions() -> None:
    """No constant is near the truth of all of them."""
    _, alone = played("stories", "online-only")
    slowdowns, shares = [], []
    for load in LOADS:
        for setting in SETTINGS:
            _, shows = played(load, "conserve", setting)
            slowdowns.append((shows.tbt_mean_s or 0) / (alone.tbt_mean_s or 1))
            shares.append(shows.offline_tps / played(load, "fcfs")[1].offline_tps)
    assert max(slowdowns) > (1 + 2 * SLOWDOWN_ERROR) * min(slowdowns)
    assert max(shares) > min(shares) + 2 * SHARE_ERROR


def test_chat_alone_is_as_fast_as_alone_and_harvests_nothing() -> None:
    says, _ = played("few", "conserve-online-only")
    assert says.chat_slowdown == pytest.approx(1.0)
    assert says.harvest_share is None


def test_a_stock_arm_says_nothing() -> None:
    says, _ = played("few", "fcfs")
    assert says.chat_slowdown is None
    assert says.harvest_share is None
