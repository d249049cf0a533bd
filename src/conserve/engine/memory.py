"""Whose the blocks of KV memory are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from conserve.engine.queue import is_online
from conserve.engine.stats import EngineStats

EVERY_S = 0.5
"""Seconds between two looks: one takes time with the number of blocks of online requests."""
NULL_BLOCK = 0
"""vLLM's placeholder for a block that a sliding window has left behind."""


class MemoryGauge:
    """Sets the gauges of KV blocks, now and then."""

    def __init__(self, kv_cache_manager: Any) -> None:
        self._manager = kv_cache_manager
        self._looked_s = -math.inf

    def gauge(self, running: Sequence[Any], now_s: float, stats: EngineStats) -> None:
        """Look if it is time. `running` are the requests that hold blocks."""
        # The step after the last request is the last for a while: what it says stands.
        if running and now_s - self._looked_s < EVERY_S:
            return
        self._looked_s = now_s
        online: set[int] = set()
        for request in running:
            if is_online(request):
                online.update(*self._manager.get_block_ids(request.request_id))
        online.discard(NULL_BLOCK)
        pool = self._manager.block_pool
        num_free = pool.get_num_free_blocks()
        num_used = pool.num_gpu_blocks - 1 - num_free
        stats.set("kv_free_blocks", num_free)
        stats.set("kv_blocks", len(online), "online")
        stats.set("kv_blocks", num_used - len(online), "offline")
