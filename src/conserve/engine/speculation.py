"""What speculative decoding makes of a waiting request that has one token left to compute.

vLLM pads it with drafts, so that it runs in one shape with the decodes beside it, asks for the
whole, and ends the engine if it gets less. Such a request costs a decode's tokens and blocks.
"""

from __future__ import annotations

from typing import Any

from conserve.core.snapshot import RequestView
from conserve.engine.door import RequestStatus
from conserve.engine.scheduler_view import SchedulerView

WAITS = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


def with_drafts(scheduler: SchedulerView, views: list[RequestView]) -> list[RequestView]:
    """The views of waiting requests, those with one token left with drafts behind it, wherever
    vLLM may pad them; it need not."""
    if not scheduler.num_spec_tokens or scheduler.dynamic_sd_lookup is not None:
        return views
    longest = scheduler.max_model_len - scheduler.num_sampled_tokens_per_step
    for view in views:
        padded = view.num_tokens + scheduler.num_spec_tokens
        if view.num_tokens - view.num_computed_tokens == 1 and padded <= longest:
            view.num_tokens = padded
    return views


def part_of(granted: int, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
    """Tokens that a request may have of the `num_new_tokens` that vLLM wants for it: no more than
    granted, but a padded one all or nothing."""
    known = request.num_tokens - num_computed_tokens
    if granted and request.status in WAITS and num_new_tokens > known:
        return num_new_tokens
    return min(granted, num_new_tokens)
