"""The scheduler's side of checkpoints: when blocks change hands, and when KV comes back."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from conserve.core.learning import Experience
from conserve.core.plan import Plan
from conserve.engine.admission import give_blocks_back
from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.pool import Worth
from conserve.engine.checkpoint.under_way import BlockIds
from conserve.engine.door import RequestStatus
from conserve.engine.queue import SCHEDULABLE, is_online
from conserve.engine.scheduler_view import SchedulerView
from conserve.engine.speculation import num_settled
from conserve.engine.tracker import RequestTracker, comes_back


class CheckpointKeeper:
    """Every way in which a request loses its blocks passes through here, so that no copy
    reads or writes a block that has changed hands (P2)."""

    def __init__(
        self,
        scheduler: SchedulerView,
        checkpointer: Checkpointer,
        tracker: RequestTracker,
        experience: Experience,
    ) -> None:
        self.checkpointer = checkpointer
        checkpointer.holds = self._holds
        self._scheduler = scheduler
        self._tracker = tracker
        self._experience = experience

    def follow(self, plan: Plan) -> None:
        """Queue the plan's copies; its restores begin when vLLM admits their requests."""
        self.checkpointer.restoring = plan.restore
        for request_id, num_tokens in plan.restore.items():
            request = self._scheduler.requests[request_id]
            if is_online(request):
                self.checkpointer.adopt(request, num_tokens, self._worth(request))
        for request_id, num_planned in plan.checkpoint.items():
            request = self._scheduler.requests[request_id]
            num_tokens = min(num_planned, num_settled(request))
            blocks = self._block_ids(request_id)
            self.checkpointer.checkpoint(request, num_tokens, blocks, self._worth(request))

    def _block_ids(self, request_id: str) -> BlockIds:
        return self._scheduler.kv_cache_manager.get_block_ids(request_id)  # type: ignore[no-any-return]

    def _holds(self, request_id: str, group: int, index: int) -> bool:
        tables = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        blocks = tables[group].req_to_blocks.get(request_id, ())
        return index >= len(blocks) or not blocks[index].is_null

    def _worth(self, request: Any) -> Worth:
        view = self._tracker.get(request.request_id)
        deadline_s = view.deadline_s if view and view.deadline_s is not None else math.inf
        saved_s = self._experience.model.predict_prefill_s(request.num_tokens)
        if is_online(request) and (conversations := self.checkpointer.conversations):
            saved_s *= conversations.chance()
        return Worth(saved_s, deadline_s)

    # Conversations

    def came(self, request: Any, now_s: float) -> None:
        """A request is about to enter vLLM's scheduler; none that had its name is meant."""
        host = self.checkpointer
        host.pool.drop(request.request_id)
        if host.conversations is not None and is_online(request):
            host.conversations.came(request, now_s)

    def look(self, now_s: float) -> None:
        """Once a step."""
        host = self.checkpointer
        host.refusals.look(now_s)
        if host.conversations is not None:
            host.conversations.look(now_s, self._experience.model, host.pool)

    # Blocks that change hands

    def num_covered_tokens(self, request: Any) -> int:
        return self.checkpointer.num_covered_tokens(request)

    def leaves(self, request: Any) -> None:
        """The running request's blocks go to others, after this call."""
        if is_online(request):
            self.checkpointer.drop_copies(request.request_id)
        elif not self.checkpointer.unusable and comes_back(request):
            blocks = self._block_ids(request.request_id)
            model = self._experience.model
            self.checkpointer.leaves(request, blocks, self._worth(request), model)

    def give_back(self, victims: Collection[str]) -> None:
        """Waiting requests whose KV was brought back, or still is, lose their blocks again."""
        held = self._scheduler.kv_holding_waiting
        for request in [r for r in held if r.request_id in victims]:
            self.checkpointer.stop_load(request.request_id)
            give_blocks_back(self._scheduler, request)

    def before_finish(self, request_ids: Any) -> None:
        """Requests (one, several, or None for all) are to end. A load under way needs no waiting
        for: the next step's orders end it before its forward, so its blocks may go at once."""
        self.take_loaded()
        names = {request_ids} if isinstance(request_ids, str) else request_ids
        for request in self._scheduler.kv_holding_waiting:
            ours = self.checkpointer.is_loading(request.request_id)
            if ours and (names is None or request.request_id in names):
                self._scheduler.finished_recving_kv_req_ids.add(request.request_id)

    def before_reset(self) -> None:
        """KV is about to be forgotten: what was brought back is no newer than the rest. Blocks that
        somebody else's connector is filling, or a session keeps, stay, and vLLM says so."""
        self.take_loaded()
        over = self._scheduler.finished_recving_kv_req_ids
        self.give_back(
            [
                request.request_id
                for request in self._scheduler.kv_holding_waiting
                if request.status in SCHEDULABLE
                or request.request_id in over
                or self.checkpointer.is_loading(request.request_id)
            ]
        )

    # Restores

    def take_loaded(self) -> None:
        """Tell vLLM of restores that have ended since the last step."""
        scheduler = self._scheduler
        for request_id, whole in self.checkpointer.take_loaded():
            request = scheduler.requests.get(request_id)
            if request is None or request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
                continue
            if not whole:
                request.num_computed_tokens = 0
                scheduler.failed_recving_kv_req_ids.add(request_id)
            scheduler.finished_recving_kv_req_ids.add(request_id)
