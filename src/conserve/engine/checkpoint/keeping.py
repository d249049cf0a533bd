"""The scheduler's side of checkpoints: when blocks change hands, and when KV comes back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from conserve.core.plan import Plan
from conserve.core.snapshot import RequestView
from conserve.engine.checkpoint.checkpointer import Checkpointer
from conserve.engine.checkpoint.pool import Worth
from conserve.engine.door import RequestStatus
from conserve.engine.queue import is_online
from conserve.engine.tracker import comes_back
from conserve.engine.waiting import give_blocks_back


class KeepsCheckpoints:
    """Mixin over a vLLM scheduler. Every way in which an offline request loses its blocks passes
    through here, so that no copy reads or writes a block that has changed hands (P2)."""

    checkpointer: Checkpointer | None = None
    experience: Any
    kv_cache_manager: Any
    kv_holding_waiting: Any
    requests: dict[str, Any]
    running: list[Any]
    finished_recving_kv_req_ids: set[str]
    failed_recving_kv_req_ids: set[str]

    def _describe(
        self, running: list[RequestView], waiting_offline: list[RequestView]
    ) -> dict[str, Any]:
        """Tell the policy what is on the host; the snapshot's fields about copies."""
        keeper = self.checkpointer
        if keeper is None:
            return {}
        keeper.describe(running)
        keeper.describe_waiting(waiting_offline)
        return {
            "copy_tokens": keeper.copy_tokens(self.clock()),  # type: ignore[attr-defined]
            "copy_tail": keeper.least_tail,
            "restore_tokens_per_s": keeper.restore_tokens_per_s,
            "restore_queue_s": keeper.restore_queue_s,
        }

    def _follow(self, plan: Plan) -> None:
        """Queue the plan's copies; its restores begin when vLLM admits their requests."""
        if self.checkpointer is None:
            return
        self.checkpointer.restoring = plan.restore
        for request_id, num_tokens in plan.checkpoint.items():
            request = self.requests[request_id]
            blocks = self._block_ids(request_id)
            self.checkpointer.checkpoint(request, num_tokens, blocks, self._worth(request))

    def _block_ids(self, request_id: str) -> Sequence[int]:
        (block_ids,) = self.kv_cache_manager.get_block_ids(request_id)
        return block_ids  # type: ignore[no-any-return]

    def _worth(self, request: Any) -> Worth:
        view = self.tracker.get(request.request_id)  # type: ignore[attr-defined]
        deadline_s = view.deadline_s if view and view.deadline_s is not None else math.inf
        return Worth(self.experience.model.predict_prefill_s(request.num_tokens), deadline_s)

    # Blocks that change hands

    def _num_covered_tokens(self, request: Any) -> int:
        return 0 if self.checkpointer is None else self.checkpointer.num_covered_tokens(request)

    def _preempt_request(
        self, request: Any, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        """vLLM frees the blocks of a running request, for us or for itself."""
        if self.checkpointer is not None and not is_online(request) and comes_back(request):
            blocks = self._block_ids(request.request_id)
            model = self.experience.model
            self.checkpointer.leaves(request, blocks, self._worth(request), model)
        super()._preempt_request(request, timestamp, drop_stale_output)  # type: ignore[misc]

    def _give_back(self, victims: Iterable[str]) -> None:
        """Waiting requests whose KV was brought back, or still is, lose their blocks again."""
        for request in [r for r in self.kv_holding_waiting if r.request_id in victims]:
            if self.checkpointer is not None:
                self.checkpointer.stop_load(request.request_id)
            give_blocks_back(self, request)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """A load under way needs no waiting for: the next step's orders end it before its
        forward, so its blocks may go at once."""
        self._take_loaded()
        if self.checkpointer is not None:
            names = {request_ids} if isinstance(request_ids, str) else request_ids
            for request in self.kv_holding_waiting:
                ours = self.checkpointer.is_loading(request.request_id)
                if ours and (names is None or request.request_id in names):
                    self.finished_recving_kv_req_ids.add(request.request_id)
        return super().finish_requests(request_ids, finished_status)  # type: ignore[misc]

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """vLLM calls this when KV is worth nothing any more (the weights have changed)."""
        try:
            return super().reset_prefix_cache(  # type: ignore[misc, no-any-return]
                reset_running_requests, reset_connector
            )
        finally:
            if self.checkpointer is not None:
                self.checkpointer.forget_all(self.requests)

    # Restores

    def _take_loaded(self) -> None:
        """Tell vLLM of restores that have ended since the last step."""
        if self.checkpointer is None:
            return
        for request_id, whole in self.checkpointer.take_loaded():
            request = self.requests.get(request_id)
            if request is None or request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
                continue
            if not whole:
                request.num_computed_tokens = 0
                self.failed_recving_kv_req_ids.add(request_id)
            self.finished_recving_kv_req_ids.add(request_id)
