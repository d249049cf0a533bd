"""Every block has one owner or is free, whatever is taken, freed and reclaimed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve.core.free_order import ONLINE
from conserve.sim.memory import RETURNS, BlockPool, OutOfBlocksError

OWNERS = ("a", "b", "c", "d")
ACTIONS = st.lists(
    st.tuples(st.sampled_from(("take", "free", "reclaim")), st.sampled_from(OWNERS),
              st.integers(0, 12)),
    max_size=80,
)  # fmt: skip


@given(ACTIONS, st.booleans())
def test_blocks_are_conserved(actions: list[tuple[str, str, int]], prefix_caching: bool) -> None:
    pool = BlockPool(20, prefix_caching=prefix_caching)
    for action, owner, count in actions:
        held, free = pool.holdings.get(owner, 0), pool.num_free_blocks
        if action == "take" and count > free:
            with pytest.raises(OutOfBlocksError):
                pool.take(owner, count)
            assert pool.num_free_blocks == free
        elif action == "take":
            pool.take(owner, count)
            assert pool.holdings.get(owner, 0) == held + count
        elif action == "free":
            assert pool.free(owner, num_remembered=count) == held
            assert pool.holdings.get(owner, 0) == 0
        elif not held:
            back = pool.reclaim(owner, count)
            assert pool.holdings.get(owner, 0) == back <= count
            assert prefix_caching or back == 0
        assert sum(pool.holdings.values()) + pool.num_free_blocks == pool.num_blocks


def test_freed_blocks_are_remembered_until_somebody_needs_them() -> None:
    pool = BlockPool(10)
    pool.take("old", 4)
    pool.take("new", 4)
    pool.free("old", num_remembered=4)
    pool.free("new", num_remembered=4)
    # Two are blank; the fifth block taken is the last one that `old` remembered.
    pool.take("other", 5)
    assert pool.reclaim("old", 10) == 1
    assert pool.reclaim("new", 10) == 4


@pytest.mark.parametrize(("class_aware", "kept"), [(True, 3), (False, 0)])
def test_what_an_online_request_left_is_forgotten_last(class_aware: bool, kept: int) -> None:
    pool = BlockPool(9, class_aware=class_aware)
    for owner, rank in (("chat", ONLINE), ("returns", RETURNS), ("done", 0)):
        pool.take(owner, 3)
        pool.free(owner, num_remembered=3, rank=rank)
    pool.take("other", 5)
    assert pool.reclaim("chat", 3) == kept
    assert pool.reclaim("returns", 3) == 1
    assert pool.reclaim("done", 3) == (0 if class_aware else 3)


def test_what_is_reclaimed_once_is_gone() -> None:
    pool = BlockPool(4)
    pool.take("a", 3)
    pool.free("a", num_remembered=3)
    assert pool.reclaim("a", 2) == 2
    pool.free("a")
    assert pool.reclaim("a", 2) == 0
    assert pool.num_free_blocks == 4


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        BlockPool(0)
