"""One flag that the engine raises and every worker of it sees: stop this step."""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

SIZE = 64
_CELL = struct.Struct("<q")
STOP, PASSED, STOPPED = 0, 8, 16
"""Offsets of three 64-bit cells: the step to stop; the last (step, safepoint) that rank 0
went past; the (step, safepoint) at which it stopped."""
_POINT_BITS = 20
RANK_TIMEOUT_S = 60.0


class StopFlag:
    """A few bytes shared by the processes of one engine on one host.

    Steps have growing numbers, so a raised flag needs no clearing: it names the step it
    means. With tensor parallelism rank 0 decides for every safepoint and publishes; the
    others wait for its word there, so that all stop at the same layer or none does. A
    reader sees whole cells, since aligned 64-bit stores are atomic.
    """

    def __init__(self, name: str, folder: str | None = None) -> None:
        base = folder or ("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())  # noqa: S108
        self.path = Path(base) / f"conserve-{os.getuid()}-{name}"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, SIZE)
            self._memory = mmap.mmap(descriptor, SIZE)
        finally:
            os.close(descriptor)

    def raise_for(self, step: int) -> None:
        """Ask for step number `step` to stop. Callable from any thread of the engine process."""
        _CELL.pack_into(self._memory, STOP, step)

    def is_raised_for(self, step: int) -> bool:
        return bool(_CELL.unpack_from(self._memory, STOP)[0] == step)

    def lead(self, step: int, point: int) -> bool:
        """Rank 0 at safepoint `point`: decide, publish, and say whether to stop."""
        word = step << _POINT_BITS | point
        if self.is_raised_for(step):
            _CELL.pack_into(self._memory, STOPPED, word)
            return True
        _CELL.pack_into(self._memory, PASSED, word)
        return False

    def follow(self, step: int, point: int) -> bool:
        """Any other rank at safepoint `point`: wait for rank 0's word there and return it.

        Raises TimeoutError where rank 0 never comes.
        """
        word = step << _POINT_BITS | point
        give_up_s = 0.0
        while True:
            stopped = _CELL.unpack_from(self._memory, STOPPED)[0]
            if stopped == word:
                return True
            if _CELL.unpack_from(self._memory, PASSED)[0] >= word:
                return False
            if not give_up_s:
                give_up_s = time.monotonic() + RANK_TIMEOUT_S
            elif time.monotonic() > give_up_s:
                raise TimeoutError(f"rank 0 gave no word for safepoint {point} of step {step}")
            os.sched_yield()

    def unlink(self) -> None:
        self.path.unlink(missing_ok=True)


def flag_name(vllm_config: Any) -> str:
    """One flag an engine: replicas of one instance (data parallel) have their own."""
    return f"{vllm_config.instance_id}-{vllm_config.parallel_config.data_parallel_index}"
