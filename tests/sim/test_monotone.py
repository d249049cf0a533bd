"""What must not get worse when something gets better: targets, links, memory, safepoints.

Each compares sums over seeds, since one changed decision changes all that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest

from conserve.core.snapshot import Targets
from conserve.metrics import percentile, throughput
from conserve.sim.run import Outcome
from tests.sim.sim_world import TARGETS, WINDOW, run

SEEDS = (1, 2, 3)
NOISE = 0.03
"""Share by which chance alone moves a sum over these seeds."""


def _harvest(outcome: Outcome) -> float:
    offline = [record for record in outcome.records if not record.online]
    got = throughput(offline, 0.0, WINDOW.duration_s)
    return got.prompt_tps + got.output_tps


def _total(figure: Callable[[Outcome], float], run_seed: Callable[[int], Outcome]) -> float:
    return sum(figure(run_seed(seed)) for seed in SEEDS)


def _p99_s(figure: str) -> Callable[[Outcome], float]:
    def p99_s(outcome: Outcome) -> float:
        online = [record for record in outcome.records if record.online]
        if figure == "ttft":
            values = [r.ttft_s for r in online if r.ttft_s is not None]
        else:
            values = [gap for r in online for gap in r.tbts_s]
        found = percentile(values, 99)
        assert found is not None
        return found

    return p99_s


def test_tighter_tbt_targets_never_raise_harvest() -> None:
    harvests = [
        _total(_harvest, partial(run, targets=Targets(TARGETS.ttft_s, tbt_s)))
        for tbt_s in (0.2, 0.1, 0.05, 0.025, 0.0125)
    ]
    for looser, tighter in pairwise(harvests):
        assert tighter <= looser * (1 + NOISE)
    assert harvests[-1] < 0.9 * harvests[0]


def test_tbt_stays_within_its_target_where_one_step_can() -> None:
    for tbt_s in (0.1, 0.05, 0.025):
        for seed in SEEDS:
            outcome = run(seed, targets=Targets(TARGETS.ttft_s, tbt_s))
            assert _p99_s("tbt")(outcome) <= tbt_s * 1.02


def test_a_faster_link_never_hurts() -> None:
    harvests = [
        _total(_harvest, partial(run, link_bytes_per_s=rate, num_blocks=200))
        for rate in (0.0, 1e6, 1e7, 1e9)
    ]
    for slower, faster in pairwise(harvests):
        assert faster >= slower * (1 - NOISE)
    assert harvests[-1] > harvests[0]


def test_more_memory_never_hurts() -> None:
    harvests = [
        _total(_harvest, partial(run, num_blocks=blocks)) for blocks in (150, 300, 600, 1200)
    ]
    for smaller, larger in pairwise(harvests):
        assert larger >= smaller * (1 - NOISE)


def test_a_faster_machine_lets_online_requests_wait_less() -> None:
    slow = _total(_p99_s("ttft"), partial(run, gap_s=0.02))
    fast = _total(_p99_s("ttft"), partial(run, gap_s=0.0))
    assert fast < slow


@pytest.mark.parametrize("figure", ["ttft", "tbt"])
def test_the_arms_come_out_in_the_order_of_their_care(figure: str) -> None:
    alone = _total(_p99_s(figure), partial(run, arm="online-only"))
    ours = _total(_p99_s(figure), partial(run, arm="conserve"))
    careless = _total(_p99_s(figure), partial(run, arm="fcfs"))
    assert alone <= ours < careless


def test_displacing_lets_online_requests_in() -> None:
    with_it = _total(_p99_s("ttft"), partial(run, num_blocks=150, max_running=8))
    without = _total(
        _p99_s("ttft"), partial(run, arm="conserve-no-displacement", num_blocks=150, max_running=8)
    )
    assert with_it < 0.8 * without
