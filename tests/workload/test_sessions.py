"""Conversations: what each turn asks, when it may come, and where a conversation ends."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from conserve.workload import (
    RequestPlan,
    Scenario,
    ScenarioError,
    Workload,
    build_workload,
)

CHAT = {
    "opening": {"kind": "lognormal", "median_tokens": 100, "sigma": 0.3, "max_tokens": 200},
    "message": {"kind": "lognormal", "median_tokens": 20, "sigma": 0.5, "max_tokens": 50},
    "answer": {"kind": "fixed", "tokens": 10},
    "pause": {"median_s": 5, "sigma": 0.5, "min_s": 2, "max_s": 9},
    "max_turns": 12,
    "max_tokens": 400,
}
AGENT = {**CHAT, "answer": {"kind": "fixed", "tokens": 3}}
OPENING = {"kind": "opening", "num_requests": 8, "span_s": 16}


def scenario(*sorts: dict[str, Any], **online: Any) -> Scenario:
    chosen = {"arrivals": OPENING, "sessions": list(sorts or (CHAT,)), "in_lead_in": True}
    return Scenario.of(
        {
            "name": "made-up",
            "about": "A test.",
            "duration_s": 60,
            "lead_in_s": 20,
            "online": {**chosen, **online},
        },
        "made-up",
    )


def conversations(workload: Workload) -> list[list[RequestPlan]]:
    found = []
    for first in workload.online:
        turns = [first]
        while following := workload.next_turns.get(turns[-1].request_id):
            turns.append(following)
        found.append(turns)
    return found


def test_each_turn_begins_with_all_that_was_said_before() -> None:
    found = conversations(build_workload(scenario(), 1, {}))
    assert len(found) == 8
    assert max(len(turns) for turns in found) > 3
    for turns in found:
        said = 0
        for turn in turns:
            assert turn.num_history_tokens == said
            assert said < turn.num_prompt_tokens <= said + (50 if said else 200)
            said = turn.num_prompt_tokens + turn.num_output_tokens
            assert said <= 400
        assert len({turn.session for turn in turns}) == 1
        assert turns[0].pause_s == 0
        assert all(2 <= turn.pause_s <= 9 for turn in turns[1:])


def test_ids_and_conversations_have_names_of_their_own() -> None:
    found = conversations(build_workload(scenario(), 1, {}))
    ids = [turn.request_id for turns in found for turn in turns]
    assert len(ids) == len(set(ids))
    assert len({turns[0].session for turns in found}) == len(found)


def test_they_begin_with_the_lead_in_one_in_each_slice() -> None:
    workload = build_workload(scenario(), 3, {})
    slices = [int((plan.arrival_s + 20) // 2) for plan in workload.online]
    assert slices == list(range(8))
    late = build_workload(scenario(in_lead_in=False), 3, {})
    assert [plan.arrival_s - 20 for plan in late.online] == pytest.approx(
        [plan.arrival_s for plan in workload.online]
    )


def test_sorts_take_turns_by_their_weights() -> None:
    found = build_workload(scenario({**CHAT, "weight": 3}, AGENT), 1, {}).online
    assert [plan.num_output_tokens for plan in found] == [10, 10, 10, 3, 10, 10, 10, 3]


def test_a_conversation_does_not_depend_on_how_many_there_are() -> None:
    more = build_workload(scenario(arrivals={**OPENING, "num_requests": 9}), 1, {})
    found = conversations(build_workload(scenario(), 1, {}))
    asked = [[turn.num_prompt_tokens for turn in turns] for turns in conversations(more)]
    assert asked[:8] == [[turn.num_prompt_tokens for turn in turns] for turns in found]


def test_a_machine_of_another_speed_gets_other_lengths_and_pauses() -> None:
    turns = conversations(build_workload(scenario().at_scale(0.05), 1, {}))[0]
    assert turns[0].num_prompt_tokens <= 50
    assert all(10 <= turn.pause_s <= 45 for turn in turns[1:])


@pytest.mark.parametrize(
    ("online", "message"),
    [
        ({"sessions": [{**CHAT, "max_turns": 0}]}, "sessions.0.max_turns: .*at least|.*equal to 1"),
        ({"sessions": [{**CHAT, "turns": 3}]}, "unknown key 'turns': did you mean 'max_turns'"),
        ({"sessions": [{**CHAT, "pause": {"median_s": 5, "min_s": 9, "max_s": 3}}]},
         "min_s 9.0 is above max_s 3.0"),
        ({"sessions": []}, "lengths: missing .or give sessions."),
        ({"lengths": {"kind": "independent", "prompt": CHAT["answer"], "output": CHAT["answer"]}},
         "lengths: sessions bring their own"),
    ],
)  # fmt: skip
def test_bad_conversations_are_refused_by_name(online: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        scenario(**online)


@pytest.mark.parametrize(
    ("online", "message"),
    [
        ({"sessions": [{**CHAT, "max_tokens": 5}]}, "max_tokens 5 is too few for a first turn"),
        ({"arrivals": {**OPENING, "span_s": 100}}, "span_s 100.0 is longer than the 80 s"),
    ],
)
def test_what_cannot_be_built_says_why(online: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        build_workload(scenario(**online), 1, {})


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """200 conversations of three turns, 50 s apart, all under one system prompt."""
    rows = []
    for i in range(200):
        for turn in range(3):
            ids = [0, *range(10 * i + 1, 10 * i + 2 + turn)]
            when_ms = 1000 * i + 50_000 * turn
            rows.append(
                {"timestamp": when_ms, "input_length": 512 * len(ids), "output_length": 5}
                | {"hash_ids": ids}
            )
    path = tmp_path / "trace.jsonl"
    rows.sort(key=lambda row: int(str(row["timestamp"])))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def replayed(keep_share: float) -> Scenario:
    arrivals = {
        "kind": "replay",
        "trace": "t",
        "format": "mooncake",
        "rate_rps": 2,
        "keep_share": keep_share,
        "mean_prompt_tokens": 300,
        "mean_output_tokens": 5,
        "max_prompt_tokens": 1000,
        "max_output_tokens": 5,
    }
    online = {"arrivals": arrivals, "in_lead_in": True}
    table = {"name": "t", "about": "A test.", "duration_s": 10, "lead_in_s": 5, "online": online}
    return Scenario.of(table, "t")


def _turns_of_one_conversation(workload: Workload) -> float:
    names = [plan.prefix[1][0] for plan in workload.online]
    return len(names) / len(set(names))


def test_a_thinned_trace_keeps_whole_conversations_near_each_other(trace: Path) -> None:
    thin, whole = (build_workload(replayed(share), 1, {"t": trace}) for share in (0.1, 1.0))
    assert _turns_of_one_conversation(thin) > 1.5 > _turns_of_one_conversation(whole)
    assert len(thin.online) == pytest.approx(30, abs=12)
    assert -5 <= min(plan.arrival_s for plan in thin.online) < 0
    assert max(plan.arrival_s for plan in thin.online) < 10


def test_a_share_that_keeps_next_to_nothing_is_refused(trace: Path) -> None:
    with pytest.raises(ScenarioError, match="keep_share 1e-09 leaves 0 of the trace"):
        build_workload(replayed(1e-9), 1, {"t": trace})


def test_a_seed_keeps_the_same_conversations(trace: Path) -> None:
    one, again, other = (
        build_workload(replayed(0.1), seed, {"t": trace}).online for seed in (1, 1, 2)
    )
    assert one == again != other


def test_random_pauses_follow_their_median() -> None:
    from conserve.workload.sessions import Pause

    rng, pause = Random(1), Pause(median_s=10, sigma=0.5, max_s=1e6)
    drawn = sorted(pause.draw(rng) for _ in range(2001))
    assert drawn[1000] == pytest.approx(10, rel=0.1)
