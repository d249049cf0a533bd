"""Whose KV is forgotten last: marks blocks with who used them before vLLM frees them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from conserve.core.snapshot import OFFLINE_HEAD
from conserve.engine.free_queue import FreeQueue
from conserve.engine.queue import is_online
from conserve.engine.scheduler_view import SchedulerView


class Retention:
    """Puts our order into vLLM's block pools (a model with several kinds of layers may have
    several), and tells it of every request that lets go of its blocks."""

    def __init__(self, scheduler: SchedulerView, *, class_aware: bool) -> None:
        self._scheduler = scheduler
        self._managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        pools = dict.fromkeys(manager.block_pool for manager in self._managers)
        self.queues = [FreeQueue.into(pool, class_aware=class_aware) for pool in pools]

    def lets_go(self, request: Any) -> None:
        """Call before vLLM frees the request's blocks, at its end or for others."""
        name = request.request_id
        reaches = None if is_online(request) else self._reaches_tokens(request)
        for manager in self._managers:
            block_ids = [block.block_id for block in manager.req_to_blocks.get(name, ())]
            order = manager.block_pool.free_block_queue.order
            if reaches is None:
                order.used_online(block_ids)
            else:
                order.used_offline(block_ids, [reach // manager.block_size for reach in reaches])

    def _reaches_tokens(self, request: Any) -> list[int]:
        """How many of the request's leading tokens each waiting offline request begins with; the
        request itself, if it will wait, with all of them."""
        hashes, size = request.block_hashes, self._hash_block_size
        head = self._scheduler.waiting.offline_head(OFFLINE_HEAD)
        reaches = (num_common(hashes, other.block_hashes) * size for other in head)
        own = [] if request.is_finished() else [len(hashes) * size]
        return own + [reach for reach in reaches if reach]

    @property
    def _hash_block_size(self) -> int:
        return int(self._scheduler.kv_cache_manager.block_pool.hash_block_size)

    def forget(self) -> None:
        """The prefix cache has been emptied."""
        for queue in self.queues:
            queue.order.forget()


def num_common(hashes: Sequence[Any], others: Sequence[Any]) -> int:
    """Leading hashes that both have. Each names all that comes before it, so that two that are
    equal have equal ones before them."""
    shorter = min(len(hashes), len(others))
    if not shorter or hashes[0] != others[0]:
        return 0
    return bisect_left(range(shorter), True, key=lambda i: hashes[i] != others[i])
