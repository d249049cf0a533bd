"""The lower tier: one bounded file, mapped into the worker's memory."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from pathlib import Path

import torch

from conserve.engine.door import init_logger

logger = init_logger("vllm.conserve")


def map_file(folder: Path, num_bytes: int) -> torch.Tensor:
    """`num_bytes` of a file in `folder`, as one flat tensor of bytes.

    All of its room is taken at once: a disk that fills up later cannot hurt. The file has no
    name (or loses it at once, where the file system knows no such files), so that the kernel
    takes it away however the process ends. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return torch.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=torch.int8)


def try_map(folder: Path, num_bytes: int) -> torch.Tensor | None:
    """The same, or one warning: there is no disk tier then."""
    try:
        return map_file(folder, num_bytes)
    except OSError as error:
        logger.warning(
            "ConServe: --checkpoint-dir %s cannot hold %d bytes (%s): no checkpoints on disk",
            folder,
            num_bytes,
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
