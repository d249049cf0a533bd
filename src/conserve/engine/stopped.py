"""A stopped step: what the workers return for it, and how the scheduler undoes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from conserve.engine.door import ModelRunnerOutput, RequestStatus
from conserve.engine.scheduler_view import SchedulerView


@dataclass
class StoppedOutput(ModelRunnerOutput):  # type: ignore[misc]
    """The output of a step that was stopped: no token of any request, and how far it got."""

    layers_done: int = 0

    @classmethod
    def of(cls, request_ids: list[str], layers_done: int, connector_output: Any) -> StoppedOutput:
        return cls(
            req_ids=request_ids,
            req_id_to_index={name: i for i, name in enumerate(request_ids)},
            sampled_token_ids=[[] for _ in request_ids],
            kv_connector_output=connector_output,
            layers_done=layers_done,
        )


@dataclass(slots=True)
class Before:
    """What a request looked like before a stoppable step, where the step cannot tell."""

    is_prefill_chunk: bool = False
    num_output_placeholders: int = 0
    num_new_placeholders: int = 0
    """Placeholders that the step added. A difference, because an earlier step may still be in
    flight (async scheduling) and take its own away before this one is undone."""

    drafts: list[int] = field(default_factory=list)
    """Tokens proposed for it, or what stands for those that a worker keeps."""
    filling: set[int] = field(default_factory=set)
    """Blocks that the step is to fill and that the prefix cache already names."""

    @classmethod
    def of(cls, request: Any) -> Before:
        return cls(
            request.is_prefill_chunk,
            request.num_output_placeholders,
            drafts=request.spec_token_ids,
        )

    def scheduled(self, request: Any, num_tokens: int, kv_cache_manager: Any) -> None:
        self.num_new_placeholders = request.num_output_placeholders - self.num_output_placeholders
        num_computed_tokens = request.num_computed_tokens - num_tokens
        self.filling = _cached_past(kv_cache_manager, request.request_id, num_computed_tokens)


def roll_back(
    scheduler: SchedulerView, num_scheduled_tokens: dict[str, int], before: dict[str, Before]
) -> list[str]:
    """Undo one scheduled step whose forward did not happen, before its (empty) output is read.

    Every request keeps its place, blocks and earlier KV; the blocks that the step was filling
    leave the prefix cache, since `allocate_slots` entered them ahead of the forward. vLLM's
    own `update_from_output` gives back `num_in_flight_tokens`. Returns the requests that had
    just been admitted on prefix hits among those blocks: their computed prefix never came
    into being, so the caller must send them back to the queue.
    """
    evicted: set[int] = set()
    for request_id, num_tokens in num_scheduled_tokens.items():
        was, request = before[request_id], scheduler.requests.get(request_id)
        if request is None or request.status != RequestStatus.RUNNING:
            # Cancelled or sent back while the step ran: only its blocks are still named.
            evicted |= was.filling
            continue
        request.num_computed_tokens -= num_tokens
        request.is_prefill_chunk = was.is_prefill_chunk
        request.num_output_placeholders -= was.num_new_placeholders
        request.spec_token_ids = was.drafts
        if request.num_computed_tokens < request.num_tokens - 1:
            scheduler._inflight_prefills.add(request)
        evicted |= _uncache(scheduler.kv_cache_manager, request)
    if not evicted:
        return []
    scheduler.kv_cache_manager.evict_blocks(evicted)
    return [
        request_id
        for request_id in num_scheduled_tokens
        if request_id in scheduler.requests
        and _reads_any(scheduler.kv_cache_manager, scheduler.requests[request_id], evicted)
    ]


def _managers(kv_cache_manager: Any) -> Iterable[Any]:
    return kv_cache_manager.coordinator.single_type_managers  # type: ignore[no-any-return]


def _cached_past(kv_cache_manager: Any, request_id: str, num_computed_tokens: int) -> set[int]:
    """Ids of the request's blocks past those tokens that the prefix cache names."""
    found: set[int] = set()
    for manager in _managers(kv_cache_manager):
        cached = manager.num_cached_block.get(request_id, 0)
        keep = num_computed_tokens // manager.block_size
        if cached > keep:
            blocks = manager.req_to_blocks[request_id][keep:cached]
            found |= {block.block_id for block in blocks if not block.is_null}
    return found


def _uncache(kv_cache_manager: Any, request: Any) -> set[int]:
    """Take back the request's claim on cached blocks past what it has computed; their ids."""
    name, num_computed_tokens = request.request_id, request.num_computed_tokens
    stale = _cached_past(kv_cache_manager, name, num_computed_tokens)
    for manager in _managers(kv_cache_manager):
        keep = num_computed_tokens // manager.block_size
        if manager.num_cached_block.get(name, 0) > keep:
            manager.num_cached_block[name] = keep
    return stale


def _reads_any(kv_cache_manager: Any, request: Any, block_ids: set[int]) -> bool:
    """Whether a block in the request's computed prefix is among `block_ids`."""
    for manager in _managers(kv_cache_manager):
        num_read = -(-request.num_computed_tokens // manager.block_size)
        blocks = manager.req_to_blocks[request.request_id][:num_read]
        # A block its own owner only partly computed is rewritten from where it stands.
        whole = request.num_computed_tokens // manager.block_size
        if any(block.block_id in block_ids for block in blocks[:whole]):
            return True
    return False
