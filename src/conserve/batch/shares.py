"""Who of several owners goes first: each gets its share of the harvest while it has work.

Pure. An owner's level is what it has had in tokens over its share, its lines in flight included;
the lowest goes first. Two rules bend that. What an owner left to others while it had no work is
soon forgotten, so whoever comes back has a little credit and no more. And a batch at risk may go
ahead of others' until its owner is so far ahead that its share would be none.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from conserve.batch.deadlines import BatchView, RecentHarvest

CREDIT_S = 300.0
"""How far ahead of the lowest an owner's batches at risk may bring it: what everybody's fair share
comes to in so many seconds."""
MEMORY_S = 2 * CREDIT_S
"""How far behind the highest an owner may be. Above CREDIT_S by more than lines in flight come to,
or whoever has run ahead would be forgiven at once."""


def equal_share(_tenant: str) -> float:
    return 1.0


@dataclass(frozen=True, slots=True)
class Standing:
    """What owners have had, as the store knows it.

    served: tokens over share, by tenant; of one that has had nothing yet, nothing.
    num_running: lines in flight, by batch.
    share_of: how much of the harvest a tenant is to have, beside others' shares.
    """

    served: Mapping[str, float] = field(default_factory=dict)
    num_running: Mapping[str, int] = field(default_factory=dict)
    share_of: Callable[[str], float] = equal_share

    def line_cost(self, view: BatchView) -> float:
        """What one line of the batch adds to its owner's level."""
        return view.line_tokens / self.share_of(view.tenant)


@dataclass(frozen=True, slots=True)
class Levels:
    """Of the owners who have work for the same servers.

    floor: the least that counts as served; who has had less is to be taken for that.
    """

    by_tenant: Mapping[str, float]
    lowest: float
    floor: float
    credit: float

    @classmethod
    def of(cls, views: Sequence[BatchView], standing: Standing, harvest: RecentHarvest) -> Levels:
        """`views`: their batches that have lines to run."""
        tenants = {view.tenant for view in views}
        # Without a rate, nothing is forgotten.
        rate = harvest.tokens_per_s or math.inf
        pace = rate / (sum(map(standing.share_of, tenants)) or 1.0)
        highest = max(standing.served.values(), default=0.0)
        floor = highest - MEMORY_S * pace
        running = defaultdict[str, float](float)
        for view in views:
            num_running = standing.num_running.get(view.batch_id, 0)
            running[view.tenant] += num_running * standing.line_cost(view)
        levels = {
            tenant: max(standing.served.get(tenant, 0.0), floor) + running[tenant]
            for tenant in tenants
        }
        # Of those who could take what another gives up: not before their lines are known.
        able = {view.tenant for view in views if view.num_left} or tenants
        lowest = min((levels[tenant] for tenant in able), default=0.0)
        return cls(levels, lowest, floor, CREDIT_S * pace)

    def may_hurry(self, tenant: str) -> bool:
        """Whether what it has at risk may go ahead of others'. Always, where it is alone."""
        return len(self.by_tenant) == 1 or self.by_tenant[tenant] - self.lowest <= self.credit
