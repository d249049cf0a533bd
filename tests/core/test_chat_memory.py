"""How much room chat's memory gets: what comes back is worth it, what does not fades."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from conserve.core.chat_memory import ChatMemory, HitCurve, Lost
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.learning import Experience
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView
from conserve.core.traffic import TrafficEstimate

BLOCK_SIZE = 16
MODEL = LatencyModel(fixed=0.02, per_token=1e-3)
NUM_BLOCKS = 800
FREE = 700
"""Blocks: as many as any room here."""


def traffic(fixed_share: float = 0.2) -> TrafficEstimate:
    """Nine tenths of step time is offline work's."""
    estimate = TrafficEstimate()
    estimate.stepped(600.0, 540.0, fixed_share)
    return estimate


def sweep(num_blocks: int = 400) -> list[RequestView]:
    return [RequestView("off", False, 0.0, num_tokens=1, num_blocks=num_blocks)]


def talk(name: str, num_blocks: int) -> Sequence[str]:
    return [f"{name}{i}" for i in range(num_blocks)]


def converse(
    memory: ChatMemory, *, conversations: int, blocks: int, every_s: float, turns: int
) -> float:
    """Each conversation comes back every `every_s`; nothing of it is found. Returns the time."""
    now_s = 0.0
    for _ in range(turns):
        for i in range(conversations):
            now_s += every_s / conversations
            names = talk(f"talk{i}-", blocks)
            memory.started(names, 0, MODEL)
            memory.left(names)
            memory.room(now_s, sweep(), FREE, traffic())
    return now_s


def memory(**settings: float) -> ChatMemory:
    """Where it keeps what pays, and nothing else unless `settings` say so."""
    chosen = PolicySettings(**{"room_min_share": 0.0, **settings})  # type: ignore[arg-type]
    return ChatMemory(NUM_BLOCKS, BLOCK_SIZE, chosen)


def test_conversations_that_come_back_get_room_though_their_kv_is_gone() -> None:
    """Four of a hundred blocks each: three others come before each comes back."""
    chat = memory()
    now_s = converse(chat, conversations=4, blocks=100, every_s=40.0, turns=3)
    room = chat.room(now_s + 1, sweep(), FREE, traffic())
    assert 400 <= room <= 450


def test_nobody_who_comes_back_needs_no_room() -> None:
    chat = memory()
    for i in range(50):
        names = talk(f"once{i}-", 10)
        chat.started(names, 0, MODEL)
        chat.left(names)
    assert chat.room(60.0, sweep(), FREE, traffic()) == 0


def test_the_room_fades_when_they_stay_away() -> None:
    chat = memory()
    now_s = converse(chat, conversations=4, blocks=100, every_s=40.0, turns=3)
    rooms = [chat.room(now_s + 60.0 * minute, sweep(), FREE, traffic()) for minute in range(1, 121)]
    assert rooms[0] > 0
    assert rooms[-1] == 0
    assert rooms == sorted(rooms, reverse=True)


def test_the_dearer_blocks_are_to_offline_work_the_less_is_left() -> None:
    def room(fixed_share: float) -> int:
        chat = memory(room_weight=1.0)
        now_s = converse(chat, conversations=4, blocks=100, every_s=40.0, turns=3)
        return chat.room(now_s + 1, sweep(), FREE, traffic(fixed_share))

    assert room(fixed_share=0.01) >= 400
    assert room(fixed_share=1.0) == 0


def test_there_is_no_more_room_than_history() -> None:
    """One conversation of four comes back and is in use: its own blocks are no history."""
    chat = memory()
    now_s = converse(chat, conversations=4, blocks=100, every_s=40.0, turns=3)
    before = chat.room(now_s + 1, sweep(), FREE, traffic())
    chat.started(talk("talk0-", 100), 0, MODEL)
    assert chat.room(now_s + 1, sweep(), FREE, traffic()) <= 300 * 9 / 8 + 1 < before


@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [
        ({"room_max_share": 0.0}, 0, 0),
        ({"room_weight": 0.0}, 0, 0),
        ({"room_weight": 0.0, "room_min_share": 0.25}, 200, 200),
        ({"room_max_share": 0.55}, 440, 440),
        # Not even one of four conversations would still be there at its turn.
        ({"room_max_share": 0.4}, 0, 0),
    ],
)
def test_the_operator_bounds_it(settings: dict[str, float], least: int, most: int) -> None:
    chat = memory(**settings)
    now_s = converse(chat, conversations=4, blocks=100, every_s=40.0, turns=3)
    assert least <= chat.room(now_s + 1, sweep(), FREE, traffic()) <= most


def test_the_least_room_is_there_from_the_first_chat_on() -> None:
    chat = memory(room_min_share=0.25)
    chat.left(talk("talk", 100))
    assert chat.room(1.0, sweep(), FREE, traffic()) == 113, "as far as there is history"
    for number in range(9):
        chat.left(talk(f"talk{number}-", 100))
    assert chat.room(3.0, sweep(), FREE, traffic()) == 200


def test_but_not_for_a_kind_that_does_not_come_back() -> None:
    chat = memory(room_min_share=0.25)
    for number in range(25):
        chat.started(talk(f"talk{number}-", 100), 0, MODEL)
        chat.left(talk(f"talk{number}-", 100))
    assert chat.room(30.0, sweep(), FREE, traffic()) == 0
    chat.started(talk("talk24-", 120), 0, MODEL)
    chat.left(talk("talk24-", 120))
    assert chat.room(33.0, sweep(), FREE, traffic()) == 200, "one came back"


def test_a_clock_that_is_set_back_changes_little() -> None:
    chat = memory()
    now_s = converse(chat, conversations=4, blocks=100, every_s=40.0, turns=3)
    room = chat.room(now_s, sweep(), FREE, traffic())
    assert chat.room(now_s - 1000.0, sweep(), FREE, traffic()) == room


def test_what_offline_work_drove_out_is_counted_when_it_is_asked_for() -> None:
    chat = memory()
    names = talk("a", 10)
    chat.left(names)
    chat.driven_out(names[4:])
    lost = chat.started(names, 6, MODEL)
    assert lost.num_blocks == 4
    assert lost.seconds == pytest.approx(4 * BLOCK_SIZE * MODEL.per_token)
    chat.left(names)
    assert chat.started(names, 0, MODEL) == Lost()


def test_what_running_requests_grow_by_is_left_in_addition() -> None:
    """They took fifty blocks of the room once; those that start leave them from then on."""
    chat = memory()
    now_s = converse(chat, conversations=4, blocks=100, every_s=40.0, turns=3)
    room = chat.room(now_s + 1, sweep(), FREE, traffic())
    assert chat.room(now_s + 1.5, sweep(), room - 50, traffic()) == room + 50
    assert room + 48 <= chat.room(now_s + 12, sweep(), FREE, traffic()) < room + 50
    assert chat.room(now_s + 600, sweep(), FREE, traffic()) <= room + 20


def test_memory_that_was_never_free_yet_is_nobodys_growth() -> None:
    chat = memory()
    now_s = converse(chat, conversations=4, blocks=100, every_s=40.0, turns=1)
    assert chat.room(now_s, sweep(), 10, traffic()) == 0
    for i in range(4):
        chat.started(talk(f"talk{i}-", 100), 0, MODEL)
        chat.left(talk(f"talk{i}-", 100))
    room = chat.room(now_s + 5, sweep(), 10, traffic())
    assert 400 <= room <= 450
    assert chat.room(now_s + 6, sweep(), 10, traffic()) == room


def test_an_emptied_cache_leaves_nothing_to_come_back_to() -> None:
    chat = memory()
    now_s = converse(chat, conversations=4, blocks=100, every_s=40.0, turns=3)
    chat.forget()
    assert chat.room(now_s + 1, sweep(), FREE, traffic()) == 0


def test_the_depth_that_is_worth_most_may_lie_behind_one_that_is_worth_little() -> None:
    """Hits of a cycle all lie at its length: what is short of it is worth nothing."""
    curve = HitCurve(1000)
    curve.hit(10, 0.1)
    curve.hit(400, 30.0)
    assert 400 <= curve.best_depth(1.0, 1e-4) <= 480
    assert 10 <= curve.best_depth(1.0, 2e-3) <= 12 or curve.best_depth(1.0, 2e-3) == 0
    assert curve.best_depth(1.0, 1.0) == 0
    curve.hit(1001, 1e9)
    assert curve.best_depth(1.0, 1e-4) <= 480


def test_a_block_is_worth_what_the_fixed_cost_of_steps_leaves_to_gain() -> None:
    """Twice the blocks are twice the requests in a step: half of its fixed cost for each."""
    price = traffic(fixed_share=0.5).harvest_price(100)
    assert price == pytest.approx(0.9 * 0.5 / 100, rel=1e-3)
    assert traffic(fixed_share=0.0).harvest_price(100) == 0.0
    assert TrafficEstimate().harvest_price(0) == 0.0


@pytest.mark.parametrize("knee", [0.0, 180.0])
def test_steps_teach_what_of_them_is_fixed(knee: float) -> None:
    """Below the knee more tokens are free, so what they do not use counts as fixed."""
    model = LatencyModel(fixed=0.02, per_token=1e-3, knee=knee)
    experience = Experience(model, mean_error=0.0)
    seconds = 0.1 if knee == 0.0 else 0.2
    experience.ended(StepShape(num_tokens=80), 80, 0.0, seconds)
    fixed_share = 0.2 if knee == 0.0 else 0.6
    assert experience.traffic.harvest_price(1) == pytest.approx(fixed_share, rel=1e-3)
