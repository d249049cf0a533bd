"""How long live batches have had no line end, look by look."""

from __future__ import annotations

from conserve.batch.deadlines import BatchView
from conserve.batch.waits import Waits


def view(
    name: str, num_done: int, *, made_s: float = 0.0, tokens: float = 100.0, paused: bool = False
) -> BatchView:
    return BatchView(name, made_s, 0, 1e9, tokens, num_done=num_done, is_paused=paused)


def test_a_batch_waits_from_the_time_it_was_made() -> None:
    waits = Waits()
    assert waits.longest_s([], 50.0) == 0
    assert waits.longest_s([view("a", 0, made_s=20), view("b", 0, made_s=40)], 50.0) == 30
    assert waits.longest_s([view("b", 0, made_s=40)], 60.0) == 20, "the other one has ended"


def test_a_line_that_ends_begins_the_wait_anew() -> None:
    waits = Waits()
    waits.longest_s([view("a", 0)], 10.0)
    assert waits.longest_s([view("a", 0)], 30.0) == 30
    assert waits.longest_s([view("a", 1)], 35.0) == 0
    assert waits.longest_s([view("a", 1)], 95.0) == 60


def test_what_came_before_the_first_look_at_a_batch_under_way_is_not_known() -> None:
    waits = Waits()
    assert waits.longest_s([view("a", 7)], 500.0) == 0
    assert waits.longest_s([view("a", 7)], 520.0) == 20


def test_a_batch_without_work_left_waits_for_nothing() -> None:
    assert Waits().longest_s([view("a", 9, tokens=0.0), view("b", 0, tokens=0.0)], 500.0) == 0


def test_a_pause_is_nobodys_wait() -> None:
    waits = Waits()
    assert waits.longest_s([view("a", 0, paused=True)], 90_000.0) == 0
    assert waits.longest_s([view("a", 0)], 90_005.0) == 5, "from the last look at the pause on"
