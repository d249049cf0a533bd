"""Blocks that several requests hold: what displacing whom would free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from conserve.core.blocks import Memory, lacking_blocks, promised_blocks
from conserve.core.snapshot import RequestView, Sharing

Table = Iterable[tuple[int, int]]
"""A request's blocks in the order of its tokens: which, and how many requests hold it."""


def arrivals_lack_room(
    waiting_online: Sequence[RequestView],
    running: Iterable[RequestView],
    num_free_blocks: int,
    num_free_slots: int,
    size: Memory,
) -> bool:
    """Whether somebody may have to yield, so that it matters who shares what. Running online
    requests get what they lack first."""
    if not waiting_online:
        return False
    num_free_blocks -= promised_blocks((r for r in running if r.online), size)
    for request in waiting_online:
        num_free_blocks -= lacking_blocks(request, size)
        num_free_slots -= 1
        if num_free_blocks < 0 or num_free_slots < 0:
            return True
    return False


def num_lasting(found: Iterable[int], tables: Iterable[Iterable[int]]) -> int:
    """Leading ones of the blocks `found` that one of those tables has: they stay with it."""
    found = list(found)
    return max((_num_common(found, table) for table in tables), default=0)


def _num_common(found: Iterable[int], table: Iterable[int]) -> int:
    pairs = zip(found, table)  # noqa: B905
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def note_sharing(tables: Iterable[tuple[str, Table]], lasting: Mapping[str, int]) -> Sharing:
    """Of requests that may be displaced; `lasting` is `Sharing.num_lasting`. Requests share leading
    blocks: those of a prefix that the later ones found. Costs what is shared."""
    shared: dict[str, int] = {}
    times: Counter[int] = Counter()
    holders: dict[int, int] = {}
    for request_id, table in tables:
        leading = list(takewhile(lambda block: block[1] > 1, table))
        if leading:
            shared[request_id] = len(leading)
            holders.update(leading)
            times.update(block_id for block_id, _ in leading)
    among = sum(times[block_id] == number for block_id, number in holders.items())
    return Sharing(shared, among, lasting)
