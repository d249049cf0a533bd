"""Conversations that pause: what they left in KV memory, what they find again, what it is worth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from conserve.core.chat_memory import ChatMemory
from conserve.core.learning import Experience
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView
from conserve.engine.door import get_block_hash
from conserve.engine.queue import is_online
from conserve.engine.retention import Retention
from conserve.engine.scheduler_view import SchedulerView
from conserve.engine.stats import EngineStats


class Remembering:
    """Tells `ChatMemory` of the engine's online requests, and counts what prefixes were found."""

    def __init__(
        self,
        scheduler: SchedulerView,
        settings: PolicySettings,
        retention: Retention,
        experience: Experience,
        stats: EngineStats,
    ) -> None:
        pool = scheduler.kv_cache_manager.block_pool
        self._scheduler = scheduler
        self._retention = retention
        self._experience = experience
        self._stats = stats
        self._hash_tokens = int(pool.hash_block_size)
        """Tokens that one of a request's hashes stands for: maybe fewer than a block has."""
        self._pool = pool
        self._memory = ChatMemory(pool.num_gpu_blocks - 1, scheduler.block_size, settings)
        for queue in retention.queues:
            queue.order.forgets = self._forgets

    def scheduled(self, output: Any) -> None:
        """vLLM has admitted requests: what they found of their prompts when they first ran."""
        for new in output.scheduled_new_reqs:
            request = self._scheduler.requests[new.req_id]
            # The second model runner is sent those that come back as new ones, too.
            if request.num_preemptions or request.prefill_stats is None:
                continue
            found = request.prefill_stats.num_local_cached_tokens
            label = "online" if is_online(request) else "offline"
            self._stats.count("prompt_tokens", request.num_prompt_tokens, label)
            self._stats.count("prefix_hit_tokens", found, label)
            if is_online(request):
                self._comes_back(request, found)

    def _comes_back(self, request: Any, found: int) -> None:
        size = self._scheduler.block_size
        names = self._names(request, request.num_prompt_tokens)
        lost = self._memory.started(names, found // size, self._experience.model)
        if lost.num_blocks:
            self._stats.count("lost_history_tokens", lost.num_blocks * size)
            self._stats.count("lost_history_seconds", lost.seconds)

    def lets_go(self, request: Any) -> None:
        """Call before vLLM frees the request's blocks."""
        if is_online(request):
            self._memory.left(self._names(request, request.num_computed_tokens))

    def room(self, now_s: float, running: Iterable[RequestView]) -> int:
        """Free blocks that offline requests which start must leave."""
        num_free = self._pool.get_num_free_blocks()
        blocks = self._memory.room(now_s, running, num_free, self._experience.traffic)
        self._stats.set("room_blocks", blocks)
        self._stats.set("history_blocks", sum(q.order.num_online for q in self._retention.queues))
        return blocks

    def forget(self) -> None:
        """The prefix cache has been emptied."""
        self._memory.forget()

    def _names(self, request: Any, num_tokens: int) -> Sequence[Any]:
        """Of the full blocks within its first tokens: each the last hash in it, which names all
        before it. None where vLLM looks for no beginnings: what is left is never found again."""
        if not self._scheduler.kv_cache_manager.enable_caching:
            return ()
        each = self._scheduler.block_size // self._hash_tokens
        end = num_tokens // self._scheduler.block_size * each
        return request.block_hashes[each - 1 : end : each]  # type: ignore[no-any-return]

    def _forgets(self, block_ids: Sequence[int]) -> None:
        """Online history is handed out. Without offline requests chat does that to itself."""
        scheduler, blocks = self._scheduler, self._pool.blocks
        holders = (*scheduler.running, *scheduler.kv_holding_waiting)
        if all(is_online(request) for request in holders):
            return
        hashes = (blocks[block_id].block_hash for block_id in block_ids)
        self._memory.driven_out(get_block_hash(key) for key in hashes if key is not None)
