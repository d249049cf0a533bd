"""Blocks are held or free, and hold what was put there until somebody else gets them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve.sim.memory import BlockPool, OutOfBlocksError
from conserve.sim.text import Text

SIZE = 4
OWNERS = ("a", "b", "c", "d")
ACTIONS = st.lists(
    st.tuples(st.sampled_from(("take", "free", "claim", "name", "unname")),
              st.sampled_from(OWNERS), st.integers(0, 12)),
    max_size=80,
)  # fmt: skip


def text_of(owner: str) -> Text:
    """Two pairs say the same."""
    return Text("ab" if owner in "ab" else "cd", shared=True)


@given(ACTIONS, st.booleans())
def test_blocks_are_conserved(actions: list[tuple[str, str, int]], class_aware: bool) -> None:
    pool = BlockPool(20, SIZE, class_aware=class_aware)
    for action, owner, count in actions:
        held, free, text = pool.holdings.get(owner, 0), pool.num_free_blocks, text_of(owner)
        if action == "take" and count > free:
            with pytest.raises(OutOfBlocksError):
                pool.take(owner, count)
            assert pool.num_free_blocks == free
        elif action == "take":
            pool.take(owner, count)
            assert pool.holdings.get(owner, 0) == held + count
        elif action == "free":
            pool.free(owner, count, text, [] if owner in "ac" else None)
            assert pool.holdings.get(owner, 0) == 0
        elif action == "claim" and not held:
            found, used = pool.find(text, count), pool.num_in_use(text, count)
            assert pool.claim(owner, text, count) == found <= count
            assert pool.num_free_blocks == free - found + used
        elif action == "name":
            pool.name(owner, text, min(count, held))
        elif action == "unname":
            pool.unname(owner, count)
        assert pool.num_held_blocks + pool.num_free_blocks == pool.num_blocks == 20
        assert len(pool.order) == pool.num_free_blocks


def test_freed_blocks_are_found_until_somebody_needs_them() -> None:
    pool, old, new = BlockPool(10, SIZE), Text("old"), Text("new")
    pool.take("old", 4)
    pool.take("new", 4)
    pool.free("old", 4, old, [])
    pool.free("new", 4, new, [])
    # Two are blank; the other three are the last ones of `old`.
    pool.take("other", 5)
    assert pool.claim("old", old, 10) == 1
    assert pool.claim("new", new, 10) == 4


def test_what_an_online_request_used_goes_last() -> None:
    for class_aware, left in ((True, (4, 1)), (False, (1, 4))):
        pool, chat, batch = BlockPool(8, SIZE, class_aware=class_aware), Text("c"), Text("b")
        pool.take("chat", 4)
        pool.free("chat", 4, chat, None)
        pool.take("batch", 4)
        pool.free("batch", 4, batch, [])
        pool.take("other", 3)
        assert (pool.find(chat, 9), pool.find(batch, 9)) == left


def test_one_block_may_have_several_holders() -> None:
    pool, text = BlockPool(6, SIZE), Text("s", shared=True)
    pool.take("first", 3)
    pool.name("first", text, 2)
    assert pool.num_in_use(text, 9) == pool.claim("second", text, 9) == 2
    assert pool.num_free_blocks == 3
    pool.free("first", 3, text, [])
    assert pool.num_free_blocks == 4
    pool.free("second", 2, text, [])
    assert pool.num_free_blocks == 6
    assert pool.find(text, 9) == 3


def test_two_who_compute_the_same_at_once_both_keep_it() -> None:
    pool, text = BlockPool(6, SIZE), Text("s", shared=True)
    for owner in ("first", "second"):
        pool.take(owner, 2)
    for owner in ("first", "second"):
        pool.name(owner, text, 2)
        pool.free(owner, 2, text, [])
    pool.take("other", 4)
    assert pool.find(text, 9) == 2, "the second one's"


def test_what_did_not_come_is_not_found() -> None:
    pool, text = BlockPool(6, SIZE), Text("s", shared=True)
    pool.take("first", 3)
    pool.name("first", text, 3)
    pool.claim("second", text, 9)
    gone = set(pool.unname("first", 1))
    assert len(gone) == 2
    assert pool.find(text, 9) == 1
    assert pool.holds_any("second", 3, gone)
    assert not pool.holds_any("second", 1, gone)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        BlockPool(0, SIZE)
