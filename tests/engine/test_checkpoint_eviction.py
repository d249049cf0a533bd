"""A pool under pressure: checkpoints of every worth come and go while requests are restored."""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("vllm")

from test_checkpoints import MakeEngine, make_engine, run_bursts

from conserve.engine.checkpoint.keeping import KeepsCheckpoints
from conserve.engine.checkpoint.pool import HostPool, Worth

pytestmark = pytest.mark.engine

__all__ = ["make_engine"]


@pytest.mark.parametrize("seed", [2, 10, 34])
def test_a_planned_restore_survives_the_eviction_of_its_checkpoint(
    make_engine: MakeEngine, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs are right, and nothing is left, however little room there is."""
    chance = random.Random(seed)
    evictions: list[int] = []
    send_down = HostPool._send_down

    def worth(self: Any, request: Any) -> Worth:
        return Worth(chance.uniform(0.1, 100))

    def counted(self: HostPool, victims: Any) -> None:
        evictions.append(len(victims))
        send_down(self, victims)

    monkeypatch.setattr(KeepsCheckpoints, "_worth", worth)
    monkeypatch.setattr(HostPool, "_send_down", counted)
    engine = make_engine(num_blocks=26, num_slots=6 + seed % 20, pace=1 + seed % 7)
    run_bursts(engine, seed, shared=(seed % 2) * 13)
    assert evictions
