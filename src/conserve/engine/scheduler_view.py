"""What our parts read and change of vLLM's scheduler, and nothing else of it."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from conserve.engine.promises import Promises
from conserve.engine.queue import ClassQueue


class SchedulerView(Protocol):
    """vLLM's names; its requests, configurations and managers are `Any` to us."""

    vllm_config: Any
    promises: Promises
    """Ours."""
    connector: Any
    """Its KV connector, or None."""
    kv_cache_config: Any
    kv_cache_manager: Any
    block_size: int
    num_spec_tokens: int
    dynamic_sd_lookup: list[int] | None
    """Drafts by the number of requests in a step; None where they are always as many."""
    _spec_decode_step_blocks: int
    """That vLLM keeps free of a load, for the first step behind it; 0 without drafts."""
    num_sampled_tokens_per_step: int
    max_model_len: int
    current_step: int
    """The number of the last one that was scheduled."""
    max_num_active_reqs: int
    max_num_scheduled_tokens: int
    log_stats: bool
    is_encoder_decoder: bool

    lora_config: Any
    """None where there are no adapters."""
    encoder_cache_manager: Any
    max_num_encoder_input_tokens: int
    """Embeddings that the encoder may compute in a step; 0 without an encoder."""

    pause_state: Any

    requests: dict[str, Any]
    """Every request that has not finished, by id."""
    running: list[Any]
    """Those that hold a slot, in the order in which they are given blocks."""
    waiting: ClassQueue
    kv_holding_waiting: ClassQueue
    """Waiting requests that hold blocks: their KV was loaded, or still is."""
    deferred_waiting: set[Any]
    """Of the waiting ones, those that vLLM could not take for a reason of their own."""
    num_waiting_for_streaming_input: int
    finished_recving_kv_req_ids: set[str]
    """Requests whose load is over; vLLM takes note when it looks at them."""
    failed_recving_kv_req_ids: set[str]
    _inflight_prefills: set[Any]
    deferred_frees: deque[tuple[int, list[Any]]]
    """(step, blocks) that go back to the pool once that step's output has been read."""

    def _preempt_request(
        self, request: Any, timestamp: float, drop_stale_output: bool = False
    ) -> None: ...
    def _request_blocks_can_be_freed(self, request: Any) -> bool: ...
    def _handle_blocked_waiting_request(self, request: Any) -> bool: ...
    def _free_request_blocks(self, request: Any) -> None: ...
    def _set_kv_fetch_stage(self, request: Any, stage: Any) -> None: ...
