"""What the engine holds for online requests alone: the load as a router is to see it.

Offline work makes room at once, so that to a chat an engine full of it is an idle one; counted
like chat, it would send chats elsewhere, close gates and add replicas.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from conserve.engine.queue import is_online
from conserve.engine.scheduler_view import SchedulerView


def num_online(requests: Iterable[Any]) -> int:
    return sum(map(is_online, requests))


def count_online_only(stats: Any, scheduler: SchedulerView, kv_usage: float) -> None:
    """Change vLLM's statistics of a step into those of online requests.

    kv_usage: the share of KV memory that they held when somebody last looked, in [0, 1].
    vLLM counts those that it could not take yet (`deferred_waiting`) apart from the others.
    """
    held = num_online(scheduler.kv_holding_waiting)
    num_waiting = len(scheduler.waiting.online) + held
    stats.num_running_reqs = num_online(scheduler.running)
    stats.num_skipped_waiting_reqs = num_online(scheduler.deferred_waiting)
    stats.num_waiting_reqs = max(0, num_waiting - stats.num_skipped_waiting_reqs)
    stats.kv_cache_usage = kv_usage if stats.num_running_reqs or held else 0.0
