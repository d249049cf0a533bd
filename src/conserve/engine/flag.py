"""One flag that the engine raises and every worker of it sees: stop this step."""

from __future__ import annotations

import mmap
import os
import secrets
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

SECRET = "CONSERVE_STOP_FLAG"  # noqa: S105 - a variable's name
SIZE = 64
STOP, PASSED, STOPPED = 0, 1, 2
"""Indices of three 64-bit cells: the step to stop; the last (step, safepoint) that rank 0
went past; the (step, safepoint) at which it stopped."""
_POINT_BITS = 20


class LostRankError(SystemExit):
    """Rank 0 gave no word. Ends the worker's process, and with it the engine: vLLM would log any
    other exception of a rank whose output it does not read, and go on without that rank."""


class StopFlag:
    """A few bytes shared by the processes of one engine on one host.

    Steps have growing numbers, so a raised flag needs no clearing: it names the step it
    means. With tensor parallelism rank 0 decides for every safepoint and publishes; the
    others wait for its word there, so that all stop at the same layer or none does. A
    reader sees whole cells: a memoryview stores an aligned 64-bit number at once, where
    struct.pack_into would write zeros first.
    """

    def __init__(
        self, name: str, folder: str | None = None, *, rank_timeout_s: float = 60.0
    ) -> None:
        self._rank_timeout_s = rank_timeout_s
        base = folder or ("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())  # noqa: S108
        self.path = Path(base) / f"conserve-{os.getuid()}-{name}"
        descriptor = _open_own(self.path)
        try:
            os.ftruncate(descriptor, SIZE)
            self._cells = memoryview(mmap.mmap(descriptor, SIZE)).cast("q")
        finally:
            os.close(descriptor)

    def reset(self) -> None:
        """Forget what an engine that was killed may have left under the same name. Call it
        before the first step."""
        for cell in (STOP, PASSED, STOPPED):
            self._cells[cell] = 0

    def raise_for(self, step: int) -> None:
        """Ask for step number `step` to stop. Callable from any thread of the engine process."""
        self._cells[STOP] = step

    def is_raised_for(self, step: int) -> bool:
        return bool(self._cells[STOP] == step)

    def last_passed(self, step: int) -> int:
        """The last safepoint of step number `step` that rank 0 went past; 0 before the first."""
        word = self._cells[PASSED]
        return word & ((1 << _POINT_BITS) - 1) if word >> _POINT_BITS == step else 0

    def lead(self, step: int, point: int) -> bool:
        """Rank 0 at safepoint `point`: decide, publish, and say whether to stop."""
        word = step << _POINT_BITS | point
        if self.is_raised_for(step):
            self._cells[STOPPED] = word
            return True
        self._cells[PASSED] = word
        return False

    def follow(self, step: int, point: int) -> bool:
        """Any other rank at safepoint `point`: wait for rank 0's word there and return it.

        Raises LostRankError where rank 0 never comes.
        """
        word = step << _POINT_BITS | point
        give_up_s = 0.0
        while True:
            if self._cells[STOPPED] == word:
                return True
            if self._cells[PASSED] >= word:
                # Between these two looks rank 0 may have stopped here and begun a new step.
                return bool(self._cells[STOPPED] == word)
            if not give_up_s:
                give_up_s = time.monotonic() + self._rank_timeout_s
            elif time.monotonic() > give_up_s:
                raise LostRankError(f"rank 0 gave no word for safepoint {point} of step {step}")
            os.sched_yield()

    def unlink(self) -> None:
        self.path.unlink(missing_ok=True)


def _open_own(path: Path) -> int:
    """A descriptor of the file, made if need be. Raises OSError for one that another user could
    have put there."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(FileExistsError):
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    descriptor = os.open(path, flags)
    status = os.fstat(descriptor)
    is_plain = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077
    if is_plain and status.st_uid == os.geteuid() and status.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    raise PermissionError(f"{path} is no file of this user's alone")


def choose_secret() -> str:
    """What the names of this server's flags begin with: nobody can guess it, and every process
    started from here on knows it."""
    return os.environ.setdefault(SECRET, secrets.token_hex(16))


def flag_name(vllm_config: Any) -> str:
    """One flag an engine: replicas of one instance (data parallel) have their own."""
    index = vllm_config.parallel_config.data_parallel_index
    return f"{choose_secret()}-{vllm_config.instance_id}-{index}"
