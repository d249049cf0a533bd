"""Victims: enough is freed, nothing needless, cheapest first, nobody for nothing."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve.core.blocks import blocks_for
from conserve.core.displacement import choose_victims
from conserve.core.latency import LatencyModel
from conserve.core.policy import decide
from conserve.core.sharing import arrivals_lack_room, note_sharing, num_lasting
from conserve.core.snapshot import RequestView, Sharing, Snapshot
from tests.core import strategies


def offline(
    name: str,
    blocks: int = 4,
    *,
    computed: int = 64,
    checkpointed: int = 0,
    deadline_s: float | None = None,
    arrival_s: float = 0.0,
) -> RequestView:
    return RequestView(
        name,
        online=False,
        arrival_s=arrival_s,
        num_tokens=computed + 1,
        num_computed_tokens=computed,
        num_blocks=blocks,
        last_token_s=arrival_s,
        deadline_s=deadline_s,
        num_checkpointed_tokens=checkpointed,
    )


def names(candidates: list[RequestView], num_blocks: int, num_slots: int = 0) -> list[str]:
    return [r.request_id for r in choose_victims(candidates, num_blocks, num_slots)]


def test_blocks_are_rounded_up() -> None:
    assert [blocks_for(n, 16) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_nobody_yields_where_nothing_is_missing() -> None:
    assert names([offline("a")], 0, 0) == []
    assert names([offline("a")], -3, -1) == []


def test_enough_and_no_more() -> None:
    candidates = [offline(name, blocks=4, arrival_s=-i) for i, name in enumerate("abcd")]
    assert names(candidates, 4) == ["a"]
    assert names(candidates, 5) == ["a", "b"]
    assert names(candidates, 16) == ["a", "b", "c", "d"]


def test_a_slot_is_freed_even_where_blocks_abound() -> None:
    assert names([offline("a", blocks=0), offline("b")], -10, 1) == ["a"]


def test_who_holds_no_block_does_not_yield_for_blocks() -> None:
    assert names([offline("none", blocks=0, computed=0), offline("b")], 2, 0) == ["b"]


def test_the_checkpointed_go_first() -> None:
    saved = offline("saved", computed=1000, checkpointed=1000)
    young = offline("young", computed=10)
    assert names([young, saved], 1) == ["saved"]
    assert names([young, saved], 8) == ["saved", "young"]


def test_what_counts_is_what_would_be_computed_again() -> None:
    much = offline("much", computed=1000, checkpointed=950)
    little = offline("little", computed=40)
    assert names([much, little], 1) == ["little"]


def test_a_checkpoint_past_the_request_is_worth_no_more_than_a_whole_one() -> None:
    ahead = offline("ahead", computed=10, checkpointed=99, arrival_s=1.0)
    whole = offline("whole", computed=10, checkpointed=10, arrival_s=2.0)
    assert names([ahead, whole], 1) == ["whole"]


def test_at_equal_cost_the_farthest_deadline_goes_first() -> None:
    soon, late, never = (
        offline("soon", deadline_s=10.0),
        offline("late", deadline_s=99.0),
        offline("never"),
    )
    assert names([soon, late, never], 12) == ["never", "late", "soon"]


def test_at_equal_cost_and_deadline_the_latest_arrival_goes_first() -> None:
    assert names([offline("old", arrival_s=1.0), offline("new", arrival_s=2.0)], 1) == ["new"]


def test_nobody_yields_where_all_together_are_not_enough() -> None:
    candidates = [offline("a"), offline("b")]
    assert names(candidates, 9) == []
    assert names(candidates, 1, 3) == []


def test_a_large_victim_spares_the_small_ones_before_it() -> None:
    small, large = offline("small", blocks=1, computed=1), offline("large", blocks=8, computed=99)
    assert names([small, large], 8) == ["large"]


def test_the_dearest_that_can_be_spared_is_spared() -> None:
    cheap = offline("cheap", blocks=3, computed=1)
    dear = offline("dear", blocks=4, computed=100)
    last = offline("last", blocks=5, computed=200)
    assert names([cheap, dear, last], 8) == ["cheap", "last"]


@st.composite
def candidate_lists(draw: st.DrawFn) -> list[RequestView]:
    number = draw(st.integers(0, 6))
    return [draw(strategies.running_requests(f"r{i}", 16, 1, online=False)) for i in range(number)]


@given(candidate_lists(), st.integers(-2, 60), st.integers(-2, 6))
def test_victims_suffice_and_none_is_needless(
    candidates: list[RequestView], num_blocks: int, num_slots: int
) -> None:
    victims = choose_victims(candidates, num_blocks, num_slots)

    def suffices(group: list[RequestView]) -> bool:
        return sum(r.num_blocks for r in group) >= num_blocks and len(group) >= num_slots

    assert len({r.request_id for r in victims}) == len(victims)
    if not victims:
        assert suffices([]) or not suffices(candidates)
        return
    assert suffices(victims)
    for victim in victims:
        assert not suffices([r for r in victims if r is not victim])


@given(candidate_lists(), st.integers(1, 6))
def test_for_slots_alone_the_cheapest_go(candidates: list[RequestView], num_slots: int) -> None:
    victims = choose_victims(candidates, 0, num_slots)

    def lost(group: list[RequestView]) -> int:
        return sum(max(0, r.num_computed_tokens - r.num_checkpointed_tokens) for r in group)

    if len(candidates) < num_slots:
        assert victims == []
        return
    groups = itertools.combinations(candidates, num_slots)
    assert len(victims) == num_slots
    assert lost(victims) == min(lost(list(group)) for group in groups)


def test_blocks_that_others_hold_are_not_freed() -> None:
    """Each has one block of its own and three of a prefix that somebody online holds as well."""
    candidates = [offline(name, blocks=4, arrival_s=-i) for i, name in enumerate("abcd")]
    sharing = Sharing(dict.fromkeys("abcd", 3))
    chosen = choose_victims(candidates, 2, 0, sharing)
    assert [r.request_id for r in chosen] == ["a", "b"]
    assert choose_victims(candidates, 5, 0, sharing) == []


def test_what_only_they_share_is_freed_when_all_of_them_go() -> None:
    candidates = [offline(name, blocks=4) for name in "abcd"]
    sharing = Sharing(dict.fromkeys("abcd", 3), num_among_offline=3)
    assert len(choose_victims(candidates, 4, 0, sharing)) == 4
    assert len(choose_victims(candidates, 7, 0, sharing)) == 4
    assert choose_victims(candidates, 8, 0, sharing) == []


def test_sharing_is_what_leading_blocks_have_in_common() -> None:
    """Blocks 1 and 2 are held by both of these, 1 by somebody else, too; 7 by somebody else."""
    sharing = note_sharing(
        [("a", [(1, 3), (2, 2), (3, 1), (7, 2)]), ("b", [(1, 3), (2, 2)]), ("c", [(9, 1)])],
        {"on": 4},
    )
    assert sharing == Sharing({"a": 2, "b": 2}, num_among_offline=1, num_lasting={"on": 4})


def test_what_one_request_holds_of_those_blocks_lasts() -> None:
    assert num_lasting([1, 2, 3], [[1, 2, 9], [4], [1, 2, 3, 5], []]) == 3
    assert num_lasting([1, 2, 3], [[2, 3]]) == 0
    assert num_lasting([1, 2, 3], []) == 0


@pytest.mark.parametrize(("shared", "displaced"), [(60, ["off2"]), (0, [])])
def test_what_a_running_chat_shares_with_an_arrival_needs_no_room(
    shared: int, displaced: list[str]
) -> None:
    """It lacks 9 blocks of 69; three documents hold 10 each. Where one of those may be the only one
    to hold what it borrows, all of them are not enough."""
    running = [
        RequestView("on", True, 0.0, 961, 960, num_blocks=61, last_token_s=9.9),
        *(
            RequestView(f"off{i}", False, i, 161, 160, num_blocks=10, last_token_s=9.9)
            for i in range(3)
        ),
    ]
    arrival = RequestView("new", True, 10.0, 1100, 960, num_borrowed_blocks=60)
    sharing = Sharing(num_lasting={"new": shared})
    snapshot = Snapshot(10.0, running, [arrival], [], 3, 9, 16, 2048, sharing=sharing)
    plan = decide(snapshot, LatencyModel(0.005, 1e-4))
    assert plan.displace == displaced
    assert ("new" in plan.grants) == bool(displaced)


def test_an_arrival_lacks_room_where_blocks_or_slots_end() -> None:
    arrival = RequestView("on", True, 0.0, num_tokens=40, num_borrowed_blocks=1)
    assert not arrivals_lack_room([arrival], [], 2, 1, size=16)
    assert arrivals_lack_room([arrival], [], 1, 1, size=16)
    assert arrivals_lack_room([arrival], [], 2, 0, size=16)
    assert arrivals_lack_room([arrival, arrival], [], 3, 9, size=16)
    assert not arrivals_lack_room([], [], 0, 0, size=16)


@pytest.mark.parametrize(("online", "lacks"), [(True, True), (False, False)])
def test_what_running_online_requests_are_promised_is_no_room(online: bool, lacks: bool) -> None:
    arrival = RequestView("on", True, 0.0, num_tokens=40, num_borrowed_blocks=1)
    grows = RequestView("grows", online, 0.0, num_tokens=33, num_computed_tokens=32, num_blocks=2)
    assert arrivals_lack_room([arrival], [grows], 2, 1, size=16) is lacks
