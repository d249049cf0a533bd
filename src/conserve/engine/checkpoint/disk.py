"""The lower tier: one bounded file of slots."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from errno import EIO
from pathlib import Path

import torch

from conserve.engine.door import init_logger

logger = init_logger("vllm.conserve")


class SlotFile:
    """`num_slots` slots of `slot_bytes` each in a file in `folder`.

    It is read and written by calls and never mapped: where a disk fails under a mapping, the
    kernel ends the process, and here a call raises OSError. All of its room is taken at once: a
    disk that fills up later cannot hurt. The file has no name (or loses it at once, where the file
    system knows no such files), so that the kernel takes it away however the process ends.
    Raises OSError.
    """

    def __init__(self, folder: Path, num_slots: int, slot_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_slots * slot_bytes)
            self.descriptor = os.dup(file.fileno())
        self._close = weakref.finalize(self, os.close, self.descriptor)

    def write(self, number: int, slot: torch.Tensor) -> None:
        """slot: bytes, in the host's memory. Raises OSError."""
        view, offset = memoryview(slot.numpy()).cast("B"), number * self.slot_bytes
        while view:
            count = os.pwrite(self.descriptor, view, offset)
            view, offset = view[count:], offset + count

    def read(self, number: int, slot: torch.Tensor) -> None:
        """Into `slot`, likewise. Raises OSError."""
        view, offset = memoryview(slot.numpy()).cast("B"), number * self.slot_bytes
        while view:
            count = os.preadv(self.descriptor, [view], offset)
            if not count:
                raise OSError(EIO, "the file is shorter than it was made")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """What is asked for from here on raises OSError."""
        self._close()
        self.descriptor = -1


def try_file(folder: Path, num_slots: int, slot_bytes: int) -> SlotFile | None:
    """The file, or one warning: there is no disk tier then."""
    try:
        return SlotFile(folder, num_slots, slot_bytes)
    except OSError as error:
        logger.warning(
            "ConServe: --checkpoint-dir %s cannot hold %d bytes (%s): no checkpoints on disk",
            folder,
            num_slots * slot_bytes,
            error.strerror or error,
        )
        return None


def why_unusable(folder: Path, num_bytes: int) -> str:
    """What stands against a file of that size in `folder`, or nothing. Makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"cannot be written: {error.strerror or error}"
    if free < num_bytes:
        return f"has {free} bytes free, not {num_bytes}"
    return ""
