"""A lock file a living worker holds, so that its death is known at once on the same machine."""

from __future__ import annotations

import fcntl
from pathlib import Path

from conserve.batch.private import make_folder, open_private


class Presence:
    """Held from construction to `leave`, or until the process ends, however it ends."""

    def __init__(self, folder: Path, worker_id: str) -> None:
        make_folder(folder)
        self._path = folder / worker_id
        self._handle = open(self._path, "w", opener=open_private)  # noqa: SIM115  (held for its life)
        fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def leave(self) -> None:
        self._path.unlink(missing_ok=True)
        self._handle.close()


def is_gone(folder: Path, worker_id: str) -> bool:
    """Whether the worker ran on this machine and is certainly dead.

    A worker that left no lock file here may be alive elsewhere: only its lease can tell.
    """
    try:
        with open(folder / worker_id) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except (FileNotFoundError, BlockingIOError):
        return False


def forget(folder: Path, worker_id: str) -> None:
    (folder / worker_id).unlink(missing_ok=True)
