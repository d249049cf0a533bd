"""What speculative decoding makes of a waiting request that has one token left to compute.

vLLM pads it with drafts, so that it runs in one shape with the decodes beside it, and insists on
them (cutting.py). Such a request costs a decode's tokens and blocks.
"""

from __future__ import annotations

from conserve.core.snapshot import RequestView
from conserve.engine.scheduler_view import SchedulerView


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
