"""What requests need beside tokens and blocks, as vLLM counts it: LoRA adapters, and media in the
encoder's cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from conserve.core.snapshot import Capacity, Media, RequestView
from conserve.engine.queue import is_online
from conserve.engine.scheduler_view import SchedulerView


def adapter_of(request: Any) -> int:
    """The LoRA adapter that it computes with; 0 for none."""
    return int(request.lora_request.lora_int_id) if request.lora_request else 0


def has_encoder_cache(scheduler: SchedulerView) -> bool:
    """Whether prompts have media: encoder-decoder models keep what they encode as KV."""
    return scheduler.max_num_encoder_input_tokens > 0 and not scheduler.is_encoder_decoder


def capacity_of(scheduler: SchedulerView) -> Capacity:
    lora = scheduler.lora_config
    max_adapters = lora.max_loras if lora else None
    if not has_encoder_cache(scheduler):
        return Capacity(max_adapters)
    room = scheduler.encoder_cache_manager.num_freeable_slots
    return Capacity(max_adapters, scheduler.max_num_encoder_input_tokens, room)


def describe_media(scheduler: SchedulerView, views: Iterable[RequestView]) -> None:
    """Fill in the media of requests and what is kept for them, as they stand between two steps."""
    if not has_encoder_cache(scheduler):
        return
    for view in views:
        request = scheduler.requests[view.request_id]
        if request.mm_features:
            view.media = _media(scheduler, request, view.num_computed_tokens)
            view.num_kept_embeds = _num_kept(scheduler, request)


def _media(scheduler: SchedulerView, request: Any, num_computed_tokens: int) -> list[Media]:
    """Those that end behind the computed tokens and that no request has in the cache."""
    cached, found = scheduler.encoder_cache_manager.cached, []
    for feature in request.mm_features:
        place = feature.mm_position
        end = place.offset + place.length
        if end > num_computed_tokens and not cached.get(feature.identifier):
            num = place.get_num_embeds()
            to_compute = 0 if feature.identifier in cached else num
            found.append(Media(place.offset, end, num, to_compute))
    return found


def _num_kept(scheduler: SchedulerView, request: Any) -> int:
    manager = scheduler.encoder_cache_manager
    kept = {request.mm_features[i].identifier for i in manager.get_cached_input_ids(request)}
    counted = (name for name in kept if _counts_for(scheduler, request, manager.cached.get(name)))
    return sum(manager.num_embeds_by_hash[name] for name in counted)


def _counts_for(scheduler: SchedulerView, request: Any, holders: set[str] | None) -> bool:
    """What several offline requests keep counts for the first of them alone: they are displaced
    one after the other, where all of them have to."""
    if not holders or min(holders) != request.request_id:
        return False
    return not any(is_online(scheduler.requests[name]) for name in holders)
