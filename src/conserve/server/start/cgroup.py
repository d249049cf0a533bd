"""What the control groups that we are in allow, as a container's limits come to us.

Version 2 has one tree of groups, version 1 one for each controller; a limit of any group above ours
holds as well. In a container the paths may be those of the host: then the tree's root is our group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

UNLIMITED_BYTES = 1 << 60
"""Version 1 says "no limit" with a number that no machine has."""


def cpu_limit(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time a second; None where there is no limit."""
    return _least("cpu", root, _quota)


def memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """None where there is no limit."""
    found = _least("memory", root, _memory)
    return None if found is None else int(found)


def _least(controller: str, root: Path, read: Callable[[Path], float | None]) -> float | None:
    limits = (read(folder) for folder in _groups(controller, root))
    return min((limit for limit in limits if limit is not None), default=None)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Our group and all above it, in each tree where the controller may be."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, names, path = line.split(":", 2)
            if number != "0" and controller not in names.split(","):
                continue
            tree = root / "sys/fs/cgroup" / ("" if number == "0" else names)
            own = tree / path.lstrip("/")
            yield from [own, *(above for above in own.parents if above.is_relative_to(tree))]


def _quota(folder: Path) -> float | None:
    words = _words(folder / "cpu.max")
    if not words:
        words = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
    match words:
        case [quota, period] if quota.isdigit() and int(period) > 0:
            return int(quota) / int(period)
    return None


def _memory(folder: Path) -> int | None:
    words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
    limit = int(words[0]) if words and words[0].isdigit() else UNLIMITED_BYTES
    return limit if limit < UNLIMITED_BYTES else None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
