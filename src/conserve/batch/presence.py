"""A lock file a living worker holds, so that its death is known at once on the same machine."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from conserve.batch.private import make_folder, open_private

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NAMES = "worker-*"
STALE_S = 3600.0
"""A file so old is not of a worker that is about to say to the database that it is there."""


class Presence:
    """Held from construction to `leave`, or until the process ends, however it ends."""

    def __init__(self, folder: Path, worker_id: str) -> None:
        make_folder(folder)
        self._path = folder / worker_id
        self._handle = open(self._path, "w", opener=open_private)  # noqa: SIM115  (held for its life)
        with suppress(OSError):  # a folder without locks: nobody is judged by them, then
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._handle.fileno(), _place(self._handle.fileno()))

    def leave(self) -> None:
        self._path.unlink(missing_ok=True)
        self._handle.close()


def is_gone(folder: Path, worker_id: str) -> bool:
    """Whether the worker ran on this machine and is certainly dead.

    A lock tells only within one kernel, and there only where both look at the same mount: elsewhere
    it may be had although the worker lives. Of a worker that left none here, or wrote of another
    place, only its lease can tell.
    """
    try:
        # To lock a file on NFS is to write it.
        with open(folder / worker_id, "rb+") as handle:
            if handle.read() != _place(handle.fileno()):
                return False
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False


def forget(folder: Path, worker_id: str) -> None:
    (folder / worker_id).unlink(missing_ok=True)


def sweep(folder: Path, alive: Collection[str]) -> None:
    """Clear away what workers left that were buried by their lease: nobody asks for it any more.

    Not what somebody holds, who may be alive in another database.
    """
    stale = time.time() - STALE_S
    for path in folder.glob(NAMES):
        with suppress(OSError):  # another server sweeps, too; or it is another user's
            is_old = path.name not in alive and path.stat().st_mtime < stale
            if is_old and not _is_held(path):
                path.unlink()


def _is_held(path: Path) -> bool:
    with open(path, "rb+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a folder without locks
            return False
    return False


def _place(descriptor: int) -> bytes:
    """Where a lock on this file is seen: the same words in every container of a machine that has
    the folder from the same mount. Not after a restart of the machine: what it held is then left to
    its lease, which has run out by that time."""
    return f"{_kernel()} {os.fstat(descriptor).st_dev}".encode()


def _kernel() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:  # not Linux, or hidden
        return socket.gethostname()
