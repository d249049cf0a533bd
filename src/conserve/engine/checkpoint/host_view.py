"""What the policy is told of the host: whose KV lies there, and what copies cost."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from conserve.core.checkpointing import least_tail
from conserve.core.latency import LatencyModel
from conserve.core.returning import worth_copying
from conserve.core.snapshot import RequestView
from conserve.engine.checkpoint.checkpointer import Checkpointer


class HostView:
    """Reads the checkpointer; changes nothing of it but the copies' budget."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._host = checkpointer

    # Requests

    def describe(self, views: Iterable[RequestView]) -> list[RequestView]:
        """Say of each view of an offline request how much of it is on the host, or will be."""
        host, described = self._host, []
        for view in views:
            if host.pool.num_slots and not view.online:
                view.num_checkpointed_tokens = host.pool.num_covered_tokens(view.request_id)
                view.num_copying_tokens = host.num_coming_tokens(view.request_id)
            described.append(view)
        return described

    def pass_over_refused(self, running: Iterable[RequestView]) -> None:
        """Those that the pool has no room for have nothing to copy: they would take the budget of
        those whose copies it would take."""
        refusals, num_used = self._host.refusals, self._host.pool.num_used_slots
        for view in running if refusals else ():
            if refusals.holds(view.request_id, num_used):
                view.num_copying_tokens = max(view.num_copying_tokens, view.num_computed_tokens)

    def describe_waiting(self, views: Iterable[RequestView]) -> list[RequestView]:
        """Copies under way count as done: a restore is queued behind them."""
        described = self.describe(views)
        for view in described:
            end = min(view.num_copying_tokens, view.num_tokens - 1)
            view.num_checkpointed_tokens = self._host.pool.num_restorable_tokens(
                view.request_id, end
            )
        return described

    def describe_online(self, views: Iterable[RequestView], requests: Mapping[str, Any]) -> None:
        """Say of each view of an online request what the host has of it, whoever left it there."""
        host = self._host
        if host.conversations is None or not host.is_ready:
            return
        for view in views:
            if view.online and view.can_restore:
                found = self._num_found_tokens(view, requests[view.request_id].block_hashes)
                view.num_checkpointed_tokens = found
                view.num_copying_tokens = max(found, host.num_coming_tokens(view.request_id))

    def _num_found_tokens(self, view: RequestView, block_hashes: Sequence[Hashable]) -> int:
        """All that was said is looked through while the request waits. Of one with blocks that was
        done, in each step: only whether the last that was found is there still."""
        pool = self._host.pool
        most = view.num_tokens - 1
        if own := pool.num_covered_tokens(view.request_id):
            return own if pool.num_restorable_tokens(view.request_id, min(own, most)) else 0
        if not view.num_blocks:
            return pool.num_shared_tokens(block_hashes, most)
        end = view.num_checkpointed_tokens // pool.block_size * pool.block_size
        return end if end and pool.shares_up_to(block_hashes, end) else 0

    def num_loading(self, requests: Iterable[Any]) -> int:
        """How many of them wait for a restore under way."""
        return sum(self._host.is_loading(request.request_id) for request in requests)

    # Copies

    def copies_online(self, model: LatencyModel) -> bool:
        """Whether KV of online requests is worth its copy."""
        host = self._host
        if host.conversations is None or not host.is_ready:
            return False
        return worth_copying(host.conversations.chance(), model, host.bandwidth.store_tokens_per_s)

    @property
    def block_size(self) -> int:
        """Tokens that are whole blocks wherever tokens are kept: what copies are planned by."""
        return self._host.pool.block_size

    @property
    def least_tail(self) -> int:
        return least_tail(self._host.pool.block_size)

    def copy_tokens(self, now_s: float) -> int:
        """What the bandwidth budget allows to be queued now, in tokens. Call once a step."""
        tokens = self._host.bandwidth.earned_tokens(now_s, self._num_queued_tokens(store=True))
        while_running = self._host.incremental and not self._host.pool.states.are_all
        return tokens if while_running and self._host.is_ready else 0

    @property
    def restore_tokens_per_s(self) -> float:
        return self._host.bandwidth.load_tokens_per_s if self._host.is_ready else 0.0

    @property
    def restore_queue_s(self) -> float:
        """How long the link is busy before a request's first token comes: with others, and with
        its recurrent state."""
        queued = self._num_queued_tokens(store=False) + self._host.pool.state_tokens
        rate = self.restore_tokens_per_s
        return queued / rate if queued and rate > 0 else 0.0

    def _num_queued_tokens(self, *, store: bool) -> int:
        return int(self._host.under_way.num_slots(store=store) * self._host.pool.slot_tokens)
