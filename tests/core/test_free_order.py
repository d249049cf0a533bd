"""The order in which free blocks are handed out, against one written down as a sorted list."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from conserve.core.free_order import ONLINE, FreeOrder

NUM_BLOCKS = 24


@dataclass
class Plainly:
    """What `FreeOrder` promises, said as plainly as possible: free blocks with their ranks."""

    free: list[int]
    rank: dict[int, int] = field(default_factory=dict)
    heeds_ranks: bool = True

    def order(self) -> list[int]:
        if not self.heeds_ranks:
            return self.free
        return sorted(self.free, key=lambda block: self.rank.get(block, 0))

    def take(self, count: int) -> list[int]:
        taken = self.order()[:count]
        for block in taken:
            self.free.remove(block)
            self.rank.pop(block, None)
        return taken

    def prepend(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.rank.pop(block, None)
        self.free[:0] = blocks


@pytest.mark.parametrize("class_aware", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_every_order_is_the_plain_one(seed: int, class_aware: bool) -> None:
    chance = random.Random(seed)
    order = FreeOrder(NUM_BLOCKS, class_aware=class_aware)
    plainly = Plainly(list(range(NUM_BLOCKS)), heeds_ranks=class_aware)
    used: list[int] = []
    for _ in range(400):
        what = chance.randrange(6)
        if what < 2:
            count = chance.randrange(len(order) + 1)
            expected = plainly.take(count)
            assert order.take(count) == expected
            used += expected
        elif what == 2 and plainly.free:
            hit = chance.choice(plainly.free)
            order.remove(hit)
            plainly.free.remove(hit)
            used.append(hit)
        else:
            freed = chance.sample(used, chance.randrange(len(used) + 1))
            used = [block for block in used if block not in freed]
            mark(chance, order, plainly, freed)
            if what == 3:
                order.prepend(freed)
                plainly.prepend(freed)
            else:
                order.append(freed)
                plainly.free += freed
        assert list(order) == plainly.order()
        assert len(order) == len(plainly.free)
        assert all(order.is_online(b) == (plainly.rank.get(b) == ONLINE) for b in range(NUM_BLOCKS))


def mark(chance: random.Random, order: FreeOrder, plainly: Plainly, blocks: list[int]) -> None:
    if chance.random() < 0.4:
        order.used_online(blocks)
        plainly.rank.update(dict.fromkeys(blocks, ONLINE))
        return
    reaches = [chance.randrange(len(blocks) + 1) for _ in range(chance.randrange(7))]
    order.used_offline(blocks, reaches)
    for place, block in enumerate(blocks):
        num_waiting = sum(reach > place for reach in reaches)
        if plainly.rank.get(block) != ONLINE:
            plainly.rank[block] = min(num_waiting.bit_length(), 3)


def test_offline_history_goes_before_online_history_however_old() -> None:
    order = FreeOrder(4)
    chat, sweep = order.take(2), order.take(2)
    order.used_online(chat)
    order.append(chat)
    order.used_offline(sweep, [])
    order.append(sweep)
    assert order.num_online == 2
    assert order.take(4) == sweep + chat


def test_an_offline_request_that_hits_a_chats_block_does_not_demote_it() -> None:
    order = FreeOrder(3)
    (chat,) = order.take(1)
    order.used_online([chat])
    order.append([chat])
    order.remove(chat)
    order.used_offline([chat], [])
    order.append([chat])
    assert order.take(3)[-1] == chat


def test_a_block_that_is_handed_out_is_nobodys_history() -> None:
    order = FreeOrder(2)
    order.used_online(order.take(2))
    order.append([1, 0])
    assert [order.is_online(block) for block in (0, 1)] == [True, True]
    order.append(order.take(2))
    assert order.num_online == 0


def test_a_prefix_is_kept_by_how_many_wait_for_it() -> None:
    """The blocks of one request; all that wait begin with the first, and fewer with each other."""
    order = FreeOrder(6)
    blocks = order.take(6)
    order.used_offline(blocks, [5, 3, 2, 1, 1])
    order.append(reversed(blocks))
    assert order.take(6) == [5, 4, 3, 2, 1, 0]
    order.used_offline([0, 1], [2])
    order.used_offline([2, 3], [2, 2])
    order.used_offline([4, 5], [])
    order.append([3, 2, 1, 0, 5, 4])
    assert order.take(6) == [5, 4, 1, 0, 3, 2]


def test_it_says_which_online_history_it_hands_out() -> None:
    told: list[list[int]] = []
    order = FreeOrder(3)
    order.forgets = lambda block_ids: told.append(list(block_ids))
    order.used_online(order.take(1))
    order.append([0])
    order.take(2)
    assert not told
    order.take(1)
    assert told == [[0]]


def test_after_forgetting_all_free_blocks_are_alike() -> None:
    order = FreeOrder(3)
    order.used_online(order.take(2))
    order.append([0, 1])
    order.forget()
    assert order.num_online == 0
    assert len(order) == 3
    assert not any(order.is_online(block) for block in range(3))


def test_what_is_not_free_can_be_neither_hit_nor_handed_out() -> None:
    order = FreeOrder(2, free=[1])
    with pytest.raises(KeyError):
        order.remove(0)
    with pytest.raises(AssertionError, match="2 blocks asked for, 1 free"):
        order.take(2)
