"""What speculative decoding adds to requests: drafts, and places in KV memory that they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from conserve.core.snapshot import RequestView
from conserve.engine.scheduler_view import SchedulerView

SHOWN = ("ngram", "draft_model", "eagle", "eagle3", "mtp")
"""Ways to draft of which it was shown on an engine. N-grams look at nothing but the tokens; the
others are layers whose KV lies in the request's blocks, beside that of the model."""


def is_shown(speculative_config: Any) -> bool:
    """Whether drafts leave nothing to the next step that is lost, or wrong, if a step is stopped or
    KV is brought back."""
    return speculative_config.method in SHOWN


@dataclass(frozen=True)
class Drafting:
    """By default there is none."""

    num_tokens: int = 0
    """Drafts of a request and step, at most."""
    num_lookahead_tokens: int = 0
    """Places behind a step's tokens that the drafts' own layers write to."""
    num_slots: int = 0
    """What drafting takes of a step's tokens, for each request in it."""
    longest: int = 1 << 60
    """Tokens that a request may have computed, drafts included."""
    restore_blocks: int = 0
    """Blocks that vLLM wants free beside those that it has KV brought back into."""

    @classmethod
    def of(cls, scheduler: SchedulerView) -> Drafting:
        if not scheduler.num_spec_tokens:
            return cls()
        config = scheduler.vllm_config
        # Canvases of block diffusion are drafts to vLLM, that nobody has drafted.
        drafter = config.speculative_config
        return cls(
            scheduler.num_spec_tokens,
            config.num_lookahead_tokens,
            drafter.max_num_new_slots_for_drafting if drafter else 0,
            scheduler.max_model_len - scheduler.num_sampled_tokens_per_step,
            scheduler._spec_decode_step_blocks,
        )

    def num_ahead(self, num_tokens: int) -> int:
        """Of the lookahead, what a request with so many known tokens has room for."""
        return max(0, min(self.num_lookahead_tokens, self.longest - num_tokens))


def num_settled(request: Any) -> int:
    """Computed tokens of the request that no draft in flight is among, which may be wrong. The
    first of a step's tokens is none."""
    return int(request.num_computed_tokens - max(0, request.num_output_placeholders - 1))


def with_drafts(scheduler: SchedulerView, views: list[RequestView]) -> list[RequestView]:
    """The views of waiting requests, those with one token left with drafts behind it, wherever
    vLLM may pad them so that they run in one shape with the decodes beside; it need not. It
    insists on them (cutting.py), and they cost a decode's tokens and blocks."""
    if not scheduler.num_spec_tokens or scheduler.dynamic_sd_lookup is not None:
        return views
    if not scheduler.num_sampled_tokens_per_step:
        return views
    longest = scheduler.max_model_len - scheduler.num_sampled_tokens_per_step
    for view in views:
        padded = view.num_tokens + scheduler.num_spec_tokens
        if view.num_tokens - view.num_computed_tokens == 1 and padded <= longest:
            view.num_tokens = padded
    return views
