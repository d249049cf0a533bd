"""What the engine holds for online requests alone: the load as a router is to see it.

Offline work makes room at once, so that to a chat an engine full of it is an idle one; counted
like chat, it would send chats elsewhere, close gates and add replicas.
"""

from __future__ import annotations

from typing import Any

from conserve.engine.queue import is_online
from conserve.engine.scheduler_view import SchedulerView


def count_online_only(stats: Any, scheduler: SchedulerView, kv_usage: float) -> None:
    """Change vLLM's statistics of a step into those of online requests.

    kv_usage: the share of KV memory that they held when somebody last looked, in [0, 1].
    vLLM counts those that it could not take yet (`deferred_waiting`) apart from the others.
    """
    held = scheduler.kv_holding_waiting.online
    # Of those that wait, offline ones without end, no more than the online ones are looked at.
    waiting = [*scheduler.waiting.online, *held]
    num_deferred = sum(request in scheduler.deferred_waiting for request in waiting)
    stats.num_running_reqs = sum(map(is_online, scheduler.running))
    stats.num_skipped_waiting_reqs = num_deferred
    stats.num_waiting_reqs = len(waiting) - num_deferred
    stats.kv_cache_usage = kv_usage if stats.num_running_reqs or held else 0.0
