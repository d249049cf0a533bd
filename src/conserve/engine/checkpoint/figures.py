"""What the copies of checkpoints report of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from conserve.engine.checkpoint.orders import Ended
from conserve.engine.checkpoint.pool import HostPool
from conserve.engine.stats import EngineStats


def count_copy(stats: EngineStats, ended: Ended, *, store: bool) -> None:
    """A copy is over, on all ranks."""
    direction = "store" if store else "load"
    stats.count("copy_seconds", ended.seconds, direction)
    stats.count("copied_bytes", ended.num_bytes, direction)


def by_source(pool: HostPool, slots: Sequence[int], num_tokens: int) -> dict[str, int]:
    """Tier -> how many of so many tokens in these slots it has."""
    share = sum(map(pool.is_on_disk, slots)) / (len(slots) or 1)
    num_disk = round(num_tokens * share)
    return {"disk": num_disk, "memory": num_tokens - num_disk}


def count_restore(stats: EngineStats, brought: Mapping[str, int], *, online: bool) -> None:
    """So many tokens have been brought back, by tier."""
    if online:
        stats.count("online_restored_tokens", sum(brought.values()))
        return
    for source, num_tokens in brought.items():
        if num_tokens:
            stats.count("restored_tokens", num_tokens, source)


def gauge(stats: EngineStats, pool: HostPool, token_bytes: float) -> None:
    """How full the pool is and of what, and who had to go since the last call."""
    if not pool.num_slots:
        return
    stats.set("checkpoint_used_ratio", pool.num_used_slots / pool.num_slots, "memory")
    if pool.num_disk_slots:
        stats.set("checkpoint_used_ratio", pool.num_used_disk_slots / pool.num_disk_slots, "disk")
    for label in ("online", "offline"):
        num_slots = pool.num_slots_of(online=label == "online")
        stats.set("checkpoint_bytes", num_slots * pool.slot_tokens * token_bytes, label)
    for how in ("evicted", "demoted", "refused_too_large"):
        if count := pool.counts.pop(how, 0):
            stats.count("checkpoint_evictions", count, how)
