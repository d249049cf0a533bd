"""Where a grant may cut the tokens that vLLM is about to compute of a request: not everywhere.

vLLM asks for the grant after it has settled what the step is to hold. A cut that it does not
expect ends the engine (drafts that pad a request), or makes the output wrong (half of a prompt
whose tokens attend to later ones, half of an image). The step then holds more than planned, or
less.
"""

from __future__ import annotations

from typing import Any

from conserve.engine.door import RequestStatus
from conserve.engine.scheduler_view import SchedulerView

WAITS = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


def part_of(
    granted: int,
    scheduler: SchedulerView,
    request: Any,
    num_computed_tokens: int,
    num_new_tokens: int,
) -> int:
    """Tokens that a request may have of the `num_new_tokens` that vLLM wants for it behind those
    that are computed: as many as granted where a cut may be, none where none are granted."""
    if not granted or granted >= num_new_tokens:
        return min(granted, num_new_tokens)
    if _is_whole(scheduler, request, num_computed_tokens, num_new_tokens):
        return num_new_tokens
    if scheduler.vllm_config.scheduler_config.disable_chunked_mm_input:
        return _beside_media(request, num_computed_tokens, num_new_tokens, granted)
    return granted


def _is_whole(
    scheduler: SchedulerView, request: Any, num_computed_tokens: int, num_new_tokens: int
) -> bool:
    """A request padded with drafts; a prompt of a model that must see all of it at once; a canvas
    of block diffusion."""
    if scheduler.num_sampled_tokens_per_step == 0:
        return True
    chunked = scheduler.vllm_config.scheduler_config.enable_chunked_prefill
    is_padded = num_new_tokens > request.num_tokens - num_computed_tokens
    return request.status in WAITS and (is_padded or not chunked)


def _beside_media(request: Any, num_computed_tokens: int, num_new_tokens: int, granted: int) -> int:
    """Cut before the image (say) that the grant ends in, or behind it where it comes first."""
    cut = num_computed_tokens + granted
    for feature in request.mm_features:
        first = feature.mm_position.offset
        end = first + feature.mm_position.length
        if first < cut < end:
            cut = first if first > num_computed_tokens else end
            break
    return min(cut - num_computed_tokens, num_new_tokens)
