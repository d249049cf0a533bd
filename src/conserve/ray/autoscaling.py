"""How many replicas Ray Serve is to run: for chats, and for batches that would miss a deadline.

Serve counts requests by itself, and would take offline ones, which wait for hours by right, for
load. Its controller gets this module by value: it imports nothing of ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

PATH = "conserve.ray.autoscaling:OnlineLoad"
"""As a config file names it."""
ONLINE = "online_requests"
"""Online requests that run or wait in a replica's engine."""
WORKERS_NEEDED = "batch_workers_needed"
"""Replicas that keep every deadline; all that share a store say the same."""


class OnlineLoad:
    """Serve's own rule on online requests alone, and no fewer replicas than deadlines need."""

    def __init__(self, batch_headroom: float = 1.0) -> None:
        self._batch_headroom = batch_headroom

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas, with a fraction; Serve applies its factors, delays and bounds to that.
        As many as before where no replica has said anything yet."""
        seen = context.aggregated_metrics or {}
        online, needed = seen.get(ONLINE), seen.get(WORKERS_NEEDED)
        if not online:
            return context.target_num_replicas, {}
        assert context.config is not None  # an autoscaled deployment has one
        for_chats = sum(online.values()) / context.config.get_target_ongoing_requests()
        for_batches = self._batch_headroom * max(needed.values(), default=0.0) if needed else 0.0
        return max(for_chats, for_batches), {}
