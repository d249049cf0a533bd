"""What is asked of the scheduler beside requests: pauses, sleep, and to forget all KV."""

from __future__ import annotations

from conserve.engine.connector import find_ours
from conserve.engine.door import PauseState
from conserve.engine.scheduler_view import SchedulerView


def admits_new(scheduler: SchedulerView) -> bool:
    """Whether vLLM admits requests that hold no blocks. While it does not, those that have begun
    are to end: whoever waits for them must not be displaced for one that waits for us."""
    return bool(scheduler.pause_state == PauseState.UNPAUSED)


def is_frozen(scheduler: SchedulerView) -> bool:
    """Whether nothing is to be computed, and everything to stay as it is."""
    return bool(scheduler.pause_state == PauseState.PAUSED_ALL)


def preempt_all(scheduler: SchedulerView, now_s: float) -> None:
    """As vLLM's own reset does it. Beside a connector vLLM keeps blocks back that a step in flight
    still writes to, since a load might not be ordered behind that step; then its reset fails.
    Ours are ordered behind it, on every device, so with ours alone those blocks go as well."""
    while scheduler.running:
        scheduler._preempt_request(scheduler.running.pop(), now_s, drop_stale_output=True)
    if find_ours(scheduler.connector) is not scheduler.connector:
        return
    pool = scheduler.kv_cache_manager.block_pool
    while scheduler.deferred_frees:
        _, blocks = scheduler.deferred_frees.popleft()
        pool.free_blocks(reversed(blocks))
