"""Every plan, whatever the snapshot: the invariants hold, and one snapshot has one plan."""

from __future__ import annotations

import copy

from hypothesis import given, settings

from conserve.core import invariants
from conserve.core.latency import LatencyModel
from conserve.core.policy import decide
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import Snapshot
from tests.core import strategies


@settings(max_examples=1500)
@given(strategies.snapshots(), strategies.models(), strategies.settings())
def test_every_plan_satisfies_the_invariants(
    snapshot: Snapshot, model: LatencyModel, policy: PolicySettings
) -> None:
    invariants.check(snapshot, decide(snapshot, model, policy), model, policy)


@given(strategies.snapshots(), strategies.models(), strategies.settings())
def test_a_snapshot_has_one_plan_and_is_left_as_it_was(
    snapshot: Snapshot, model: LatencyModel, policy: PolicySettings
) -> None:
    before = copy.deepcopy(snapshot)
    plan = decide(snapshot, model, policy)
    assert snapshot == before
    assert decide(before, model, policy) == plan
