"""What the demo sends on machines of several speeds, and that chat alone is well inside."""

from __future__ import annotations

import pytest

from conserve.bench.demo.plan import DemoPlan, Wanted, alone_needs_s, plan_for
from conserve.bench.scale import REFERENCE, Speed

SLOW = Speed(84.0, 8.0, 36.0)
LAPTOP = Speed(500.0, 20.0, 73.0)
FAST = Speed(24_000.0, 200.0, 2_500.0)
SPEEDS = [Speed(20.0, 2.0, 9.0), SLOW, LAPTOP, REFERENCE, FAST, Speed(2e5, 400.0, 6e3)]
LEFT_S = 280.0


def test_the_machine_that_it_was_made_on_gets_the_defaults() -> None:
    assert plan_for(REFERENCE, LEFT_S, Wanted()) == DemoPlan()
    nearly = Speed(0.82 * REFERENCE.prefill_tps, REFERENCE.stream_tps, REFERENCE.batch_tps)
    assert plan_for(nearly, LEFT_S, Wanted()) == DemoPlan()


@pytest.mark.parametrize("speed", SPEEDS)
def test_chat_alone_is_well_inside_its_targets(speed: Speed) -> None:
    plan = plan_for(speed, LEFT_S, Wanted())
    ttft_s, tbt_s = alone_needs_s(speed, plan)
    assert 1.9 * ttft_s <= plan.ttft_target_s
    assert 1.9 * tbt_s <= plan.tbt_target_s


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("left_s", [60.0, 150.0, LEFT_S, 1000.0])
def test_both_periods_fit_the_time_and_show_something(speed: Speed, left_s: float) -> None:
    plan = plan_for(speed, left_s, Wanted())
    assert plan.alone_s + plan.together_s <= max(left_s, 75.0)
    assert plan.num_bursts >= 2
    assert plan.burst_size >= 2
    assert plan.together_s / plan.sample_s > 50
    arrivals = plan.arrivals_s()
    assert len(arrivals) == plan.num_chats
    assert 0 <= arrivals[0] <= arrivals[-1] <= plan.alone_s


@pytest.mark.parametrize("speed", SPEEDS[1:])
def test_the_pages_can_be_read_in_their_period(speed: Speed) -> None:
    """With half of the machine to spare for chats, and for shorter pages than the longest."""
    plan = plan_for(speed, LEFT_S, Wanted())
    page_s = (60 + 1.35 * 0.42 * plan.page_words) / speed.prefill_tps
    page_s += plan.summary_tokens / speed.batch_tps
    assert plan.num_documents * page_s < 0.5 * plan.together_s
    assert plan.in_flight <= plan.num_documents


def test_a_slower_machine_gets_shorter_texts_then_smaller_bursts_then_fewer() -> None:
    laptop, slow = (plan_for(speed, LEFT_S, Wanted()) for speed in (LAPTOP, SLOW))
    assert (laptop.excerpt_words, laptop.page_words) == (25, 250)
    assert laptop.burst_size == 5
    assert slow.burst_size == 2
    assert slow.num_bursts < laptop.num_bursts <= DemoPlan().num_bursts
    assert not laptop.has_default_targets
    assert not slow.has_default_targets


def test_a_faster_machine_is_done_sooner_and_gets_more() -> None:
    plan = plan_for(FAST, LEFT_S, Wanted())
    assert (plan.alone_s, plan.sample_s) == (14.0, 0.25)
    assert plan.burst_size > DemoPlan().burst_size
    assert plan.num_documents > DemoPlan().num_documents
    assert plan.has_default_targets


def test_what_the_user_asks_for_stands() -> None:
    plan = plan_for(LAPTOP, LEFT_S, Wanted(alone_s=12.0))
    assert (plan.alone_s, plan.together_s) == (12.0, 168.0)
    assert plan_for(REFERENCE, LEFT_S, Wanted(together_s=30.0)).num_documents == 79


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_period_of_no_time_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="alone_s must be above 0 seconds"):
        Wanted(alone_s=value)
    with pytest.raises(ValueError, match="together_s must be above 0 seconds"):
        Wanted(together_s=value)
