"""A pool under pressure: checkpoints of every worth come and go while requests are restored."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.snapshot import RequestView
from conserve.engine.checkpoint.bandwidth import Bandwidth
from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.eviction import Eviction
from conserve.engine.checkpoint.host_view import HostView
from conserve.engine.checkpoint.keeping import CheckpointKeeper
from conserve.engine.checkpoint.orders import Ended, Report
from conserve.engine.checkpoint.pool import HostPool, Worth
from tests.engine.test_checkpoints import MakeEngine, make_engine, run_bursts

pytestmark = pytest.mark.engine

__all__ = ["make_engine"]


@pytest.mark.parametrize("seed", [2, 10, 34])
def test_a_planned_restore_survives_the_eviction_of_its_checkpoint(
    make_engine: MakeEngine, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs are right, and nothing is left, however little room there is."""
    chance = random.Random(seed)
    evictions: list[int] = []
    send_down = Eviction._send_down

    def worth(self: Any, request: Any) -> Worth:
        return Worth(chance.uniform(0.1, 100))

    def counted(self: Eviction, victims: Any, grower: Any) -> None:
        evictions.append(len(victims))
        send_down(self, victims, grower)

    monkeypatch.setattr(CheckpointKeeper, "_worth", worth)
    monkeypatch.setattr(Eviction, "_send_down", counted)
    engine = make_engine(num_blocks=26, num_slots=6 + seed % 20, pace=1 + seed % 7)
    run_bursts(engine, seed, shared=(seed % 2) * 13)
    assert evictions


@pytest.mark.parametrize("priority", [0, 1])
def test_tokens_are_brought_back_once_they_are_there(priority: int) -> None:
    """Not where the load's blocks went to others meanwhile, nor where it failed."""
    pool = HostPool(num_slots=4, block_size=4)
    keeper = Checkpointer(pool, Bandwidth(token_bytes=16), num_ranks=1)
    request = SimpleNamespace(
        request_id="a", block_hashes=[], priority=priority, num_computed_tokens=8
    )
    job = keeper.checkpoint(request, 8, [[7, 8]], Worth(1.0))
    assert job is not None
    keeper.take(Report(ended={job.number: Ended()}))

    def load() -> Any:
        keeper.restoring = {"a": 8}
        keeper.load(request, 8, [[5, 6]])
        return keeper.take_orders().jobs[-1]

    def restored() -> float:
        name, label = ("restored_tokens", "memory") if priority else ("online_restored_tokens", "")
        return float(keeper.stats.data.get(name, {}).get(label, 0.0))

    job = load()
    keeper.stop_load("a")
    keeper.take(Report(ended={job.number: Ended(dropped=True)}))
    assert restored() == 0
    job = load()
    assert restored() == 0, "it is under way"
    keeper.take(Report(ended={job.number: Ended()}))
    assert restored() == 8
    job = load()
    keeper.take(Report(ended={job.number: Ended(failed_slots=set(job.slots))}))
    assert restored() == 8


def test_a_checkpoint_that_is_lost_is_not_restored_from_copies_still_under_way() -> None:
    """Its first block cannot be copied while the copy of its second goes on."""
    pool = HostPool(num_slots=4, block_size=4)
    keeper = Checkpointer(pool, Bandwidth(token_bytes=16), num_ranks=1)
    request = SimpleNamespace(request_id="a", block_hashes=[], priority=1, num_computed_tokens=8)
    first = keeper.checkpoint(request, 4, [[7, 8]], Worth(1.0))
    second = keeper.checkpoint(request, 8, [[7, 8]], Worth(1.0))
    assert first is not None
    assert second is not None
    keeper.restoring = {"a": 8}
    assert keeper.num_restored_tokens("a") <= 8
    keeper.take(Report(ended={first.number: Ended(failed_slots=set(first.slots))}))
    assert keeper.num_restored_tokens("a") == 0
    assert HostView(keeper).describe([RequestView("a", False, 0.0, 8)])[0].num_copying_tokens == 0
    assert pool.num_used_slots == 2, "the second copy's slots were given away under it"
    keeper.take(Report(ended={second.number: Ended()}))
    assert pool.num_used_slots == 0
    assert pool.num_covered_tokens("a") == 0
