"""How much more offline work an engine would take, from 0 (none) to 1 (as much as an idle one).

The least of three shares, as one step's snapshot and plan show them:

    time    of the step's time limit, what is not filled; 0 where an offline request that runs was
            given less than it could compute
    memory  of all KV blocks, those that are free beyond what pausing conversations keep and what
            offline requests that wait will take
    slots   of all slots, those that are free beyond the requests that wait
"""

from __future__ import annotations

import math

from conserve.core.blocks import UNCOUNTED, lacking_blocks
from conserve.core.latency import LatencyModel
from conserve.core.plan import Plan
from conserve.core.snapshot import Snapshot

MEMORY_S = 2.0
"""What a step shows fades with this time constant: steps with and without a prompt alternate."""
SAMPLE_S = 0.05
"""At most one step in such a time is looked at."""


def step_budget(
    snapshot: Snapshot,
    plan: Plan,
    model: LatencyModel,
    *,
    num_waiting_offline: int,
    num_blocks: int,
    num_slots: int,
) -> float:
    """What one step shows, in [0, 1].

    num_waiting_offline: all of them, of which the snapshot has the first. num_blocks, num_slots:
    the engine's, free or not.
    """
    return max(
        0.0,
        min(
            _time_share(snapshot, plan, model),
            _memory_share(snapshot, num_waiting_offline, num_blocks),
            _slot_share(snapshot, num_waiting_offline, num_slots),
        ),
    )


def _time_share(snapshot: Snapshot, plan: Plan, model: LatencyModel) -> float:
    for request in snapshot.running:
        lacking = request.num_tokens - request.num_computed_tokens
        if not request.online and plan.grants.get(request.request_id, 0) < lacking:
            return 0.0
    unfilled = 1.0 - plan.shape.num_tokens / snapshot.max_step_tokens
    if plan.limit_s == math.inf:
        return unfilled
    filled_s = model.predict_s(plan.shape) * (1 + model.margin)
    return min(unfilled, 1.0 - filled_s / plan.limit_s) if plan.limit_s > 0 else 0.0


def _memory_share(snapshot: Snapshot, num_waiting: int, num_blocks: int) -> float:
    """Those that wait behind the snapshot's take as much each as the ones in it."""
    if snapshot.num_free_blocks >= UNCOUNTED or num_blocks <= 0:
        return 1.0
    head = snapshot.waiting_offline
    wanted = sum(lacking_blocks(request, snapshot.memory) for request in head)
    if head:
        wanted = wanted * max(num_waiting, len(head)) // len(head)
    return (snapshot.num_free_blocks - snapshot.num_remembered_blocks - wanted) / num_blocks


def _slot_share(snapshot: Snapshot, num_waiting: int, num_slots: int) -> float:
    num_waiting = max(num_waiting, len(snapshot.waiting_offline)) + len(snapshot.waiting_online)
    return (snapshot.num_free_slots - num_waiting) / num_slots


class HarvestBudget:
    """The mean of what the steps of late showed. Times are passed in, in seconds."""

    def __init__(self) -> None:
        self.value = 1.0
        self._shown = 1.0
        self._shown_s: float | None = None

    def wants(self, now_s: float) -> bool:
        """Whether it is time to look at a step again."""
        return self._shown_s is None or now_s - self._shown_s >= SAMPLE_S

    def showed(self, now_s: float, budget: float) -> None:
        """A step that is decided now shows this; what the one before showed held until now."""
        since_s = 0.0 if self._shown_s is None else now_s - self._shown_s
        self.value = self._shown + (self.value - self._shown) * math.exp(-since_s / MEMORY_S)
        self._shown, self._shown_s = budget, now_s

    def idle(self) -> None:
        """Nothing is left in the engine."""
        self.value = self._shown = 1.0
