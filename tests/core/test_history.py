"""What paused conversations left, and how deep it lies, against a list written down plainly."""

from __future__ import annotations

import random

from conserve.core.history import Found, History


def test_a_conversation_is_found_as_deep_as_what_came_since() -> None:
    history = History(100)
    history.left("abc")
    history.left("defg")
    assert history.find("abcx") == [Found(0, 3, 7)]
    assert history.find("defg") == [Found(0, 4, 4)]
    assert history.find("xabc") == []


def test_the_first_blocks_of_a_visit_are_kept_longer_than_its_last() -> None:
    history = History(100)
    history.left("abcd")
    history.left("z")
    assert history.find("abx") == [Found(0, 2, 3)]


def test_parts_that_were_left_at_different_times_have_depths_of_their_own() -> None:
    """Everybody's system prompt came back later than one conversation's own words."""
    history = History(100)
    history.left("sab")
    history.left("sxy")
    assert history.find("sab") == [Found(0, 1, 1), Found(1, 2, 5)]


def test_what_is_in_use_again_is_history_no_more() -> None:
    history = History(100)
    history.left("abc")
    history.left("de")
    history.drop("ab")
    assert history.find("abc") == []
    assert history.find("cx") == [Found(0, 1, 3)]
    assert len(history) == 3


def test_the_oldest_visits_are_forgotten_beyond_what_memory_could_ever_hold() -> None:
    history = History(5)
    history.left("abc")
    history.left("de")
    assert len(history) == 5
    history.left("f")
    assert history.find("abc") == []
    assert history.find("de") == [Found(0, 2, 3)]
    history.left("0123456")
    assert len(history) == 0


def test_depths_are_those_of_a_list_of_blocks() -> None:
    """One block a visit, so that the newest block first is the order in which memory keeps them."""
    chance = random.Random(4)
    history, newest_first = History(12), list[str]()
    for _ in range(2000):
        name = chance.choice("abcdefghijklmnopqrstuvwxyz")
        expected = [Found(0, 1, newest_first.index(name) + 1)] if name in newest_first else []
        assert history.find(name) == expected
        if chance.random() < 0.3:
            history.drop(name)
            newest_first = [other for other in newest_first if other != name]
        else:
            history.left(name)
            newest_first = [name, *(other for other in newest_first if other != name)][:12]
        assert len(history) == len(newest_first)


def test_only_what_offline_work_drove_out_is_lost_to_it() -> None:
    history = History(100)
    history.left("abcd")
    history.driven_out("cdx")
    assert history.num_lost("abcd", 2) == 2
    assert history.num_lost("abcde", 3) == 1
    assert history.num_lost("xcd", 0) == 0
    history.left("efgh")
    assert history.num_lost("efgh", 0) == 0


def test_what_was_lost_once_is_not_lost_for_ever() -> None:
    history = History(100)
    history.left("ab")
    history.driven_out("ab")
    history.drop("ab")
    history.left("ab")
    assert history.num_lost("ab", 0) == 0


def test_an_emptied_history_finds_nothing() -> None:
    history = History(100)
    history.left("ab")
    history.driven_out("a")
    history.clear()
    assert history.find("ab") == []
    assert history.num_lost("ab", 0) == len(history) == 0
