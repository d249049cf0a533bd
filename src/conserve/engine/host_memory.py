"""Memory of this host."""

from __future__ import annotations

import psutil

from conserve.engine.door import get_cgroup_memory_limit, get_cgroup_memory_usage


def available_bytes() -> int:
    """What can be had without swapping, within the limit of our container."""
    available = int(psutil.virtual_memory().available)
    limit = get_cgroup_memory_limit()
    if limit is None:
        return available
    return max(0, min(available, int(limit) - int(get_cgroup_memory_usage() or 0)))
