"""A plan beside the snapshot that it was made for, as `core.invariants` looks at it."""

from __future__ import annotations

from collections.abc import Iterable

from conserve.core.blocks import lacking_blocks, promised_blocks
from conserve.core.latency import LatencyModel, StepShape
from conserve.core.plan import Plan
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView, Snapshot

EPSILON = 1e-9


class InvariantError(AssertionError):
    """A plan that must never reach an engine; names the property and the request."""


class Case:
    """A plan beside the snapshot that it was made for."""

    def __init__(
        self, snapshot: Snapshot, plan: Plan, model: LatencyModel, settings: PolicySettings
    ) -> None:
        self.snapshot, self.plan, self.model, self.settings = snapshot, plan, model, settings
        self.waiting = (*snapshot.waiting_online, *snapshot.waiting_offline)
        self.by_id = {view.request_id: view for view in (*snapshot.running, *self.waiting)}
        self.running = {view.request_id for view in snapshot.running}
        self.starts = {*plan.grants, *plan.restore}
        self.longest_s = plan.predicted_s * (1 + model.margin)

    @property
    def granted(self) -> list[RequestView]:
        return [self.by_id[request_id] for request_id in self.plan.grants]

    def runs(self, view: RequestView) -> bool:
        return view.request_id in self.running

    def decodes(self, view: RequestView) -> bool:
        left = view.num_tokens - view.num_computed_tokens
        return view.last_token_s is not None and left <= self.snapshot.decode_width

    def lacking(self, view: RequestView) -> int:
        return lacking_blocks(view, self.snapshot.memory)

    def freed_by(self, displaced: Iterable[RequestView]) -> int:
        """Blocks that become free when these go. What only offline requests share goes with the
        last of them."""
        sharing, gone = self.snapshot.sharing, list(displaced)
        return sum(map(sharing.freed_by, gone)) + sharing.num_among_offline * self._all_go

    @property
    def _all_go(self) -> bool:
        running = [view for view in self.snapshot.running if not view.online]
        return all(view.request_id in self.plan.displace for view in running)

    def needed_from(self, victim: RequestView) -> int:
        """Blocks that would stay taken if this one stayed."""
        sharing = self.snapshot.sharing
        return sharing.freed_by(victim) + sharing.num_among_offline * self._all_go

    def promised(self, views: Iterable[RequestView]) -> int:
        return promised_blocks(views, self.snapshot.memory)

    def shape_of(self, views: Iterable[RequestView]) -> StepShape:
        """What the plan grants to `views`; whoever waits starts with a prefill."""
        shape = StepShape()
        for view in views:
            decodes = self.runs(view) and self.decodes(view)
            add = shape.add_decode if decodes else shape.add_prefill
            add(self.plan.grants[view.request_id], view.num_computed_tokens)
        return shape


def require(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(message)
