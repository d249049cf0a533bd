"""What becomes of copies that the host pool has no room for, or that fail: on the scheduler's side
alone, with reports made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.checkpointing import choose_copies
from conserve.core.snapshot import RequestView
from conserve.engine.checkpoint.bandwidth import Bandwidth
from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.host_view import HostView
from conserve.engine.checkpoint.orders import Ended, Report
from conserve.engine.checkpoint.pool import HostPool, Worth
from conserve.engine.checkpoint.refusals import RETRY_S

pytestmark = pytest.mark.engine

SIZE = 4
BLOCKS = [list(range(8))]
"""Of any request, in its only KV group."""


def make_host(num_slots: int) -> Checkpointer:
    host = Checkpointer(HostPool(0, SIZE), Bandwidth(token_bytes=16), num_ranks=1)
    host.take(Report(pools=[num_slots], bytes_per_s=1e6))
    return host


def make_request(name: str, num_computed: int) -> Any:
    hashes = [f"{name}{i}" for i in range(num_computed // SIZE)]
    return SimpleNamespace(
        request_id=name, priority=1, num_computed_tokens=num_computed, block_hashes=hashes
    )


def full_of_others(num_slots: int) -> Checkpointer:
    """A pool that a worthier checkpoint fills, and that has refused `mine` already."""
    host = make_host(num_slots)
    host.pool.grow("theirs", SIZE * num_slots, [], Worth(9.0))
    assert host.checkpoint(make_request("mine", 8), 8, BLOCKS, Worth(1.0)) is None
    return host


def test_who_was_refused_asks_again_once_others_are_worth_less() -> None:
    """As conversations are that stay silent: as many slots are used meanwhile."""
    host, mine = full_of_others(4), make_request("mine", 8)
    host.refusals.look(10.0)
    assert host.checkpoint(mine, 8, BLOCKS, Worth(1.0)) is None
    host.pool.rate("theirs", Worth(0.1))
    host.refusals.look(10.0 + RETRY_S / 2)
    assert host.checkpoint(mine, 8, BLOCKS, Worth(1.0)) is None, "not in every step"
    host.refusals.look(10.0 + RETRY_S)
    assert host.checkpoint(mine, 8, BLOCKS, Worth(1.0)) is not None


def test_who_was_refused_asks_again_when_its_blocks_go() -> None:
    """It is the last time that they can be copied."""
    host = full_of_others(4)
    host.pool.rate("theirs", Worth(0.1))
    assert host.checkpoint(make_request("mine", 8), 8, BLOCKS, Worth(1.0), leaves=True) is not None


def test_who_was_refused_takes_no_budget_of_others() -> None:
    host = full_of_others(4)
    mine = RequestView("mine", False, 0.0, 8, num_computed_tokens=8)
    other = RequestView("other", False, 0.0, 16, num_computed_tokens=16)
    running = HostView(host).describe([mine, other])
    assert list(choose_copies(running, 8, SIZE)) == ["mine"], "the cheapest to displace is first"
    HostView(host).pass_over_refused(running)
    assert choose_copies(running, 8, SIZE) == {"other": 8}


def test_copies_behind_one_that_failed_end_with_it() -> None:
    """They count for nothing, and nobody else would end them where their blocks change hands."""
    host, request = make_host(8), make_request("a", 12)
    jobs = [host.checkpoint(request, end, BLOCKS, Worth(1.0)) for end in (4, 8, 12)]
    first, *later = [job.number for job in jobs if job is not None]
    assert len(later) == 2
    host.take_orders()
    host.take(Report(ended={first: Ended(failed_slots={0})}))
    host.drop_copies("a")
    orders = host.take_orders()
    assert set(later) <= {*orders.drop} & {*orders.wait}
