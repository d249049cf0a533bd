"""Where the KV copies of offline requests go, settled before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conserve.engine.settings import CHECKPOINT_SHARE
from conserve.server.errors import BadInputError
from conserve.server.start.amounts import gib


def take_flags(args: argparse.Namespace, free_bytes: Callable[[], int]) -> dict[str, Any]:
    """The engine settings that the `--checkpoint*` flags, taken out of `args`, make for each
    replica on this host: they share what the flags name. Raises BadInputError."""
    own = {
        name: vars(args).pop(name)
        for name in (
            "checkpoint",
            "checkpoint_bytes",
            "checkpoint_dir",
            "checkpoint_dir_bytes",
        )
    }
    online = not vars(args).pop("no_checkpoint_online")
    _check_together(own)
    num_replicas = max(1, args.data_parallel_size_local or args.data_parallel_size)
    num_bytes = own["checkpoint_bytes"] or 0
    if own["checkpoint"] != "off":
        free = free_bytes()
        if num_bytes > free:
            raise BadInputError(
                f"--checkpoint-bytes asks for {gib(num_bytes, 2)}, but {gib(free, 2)} of memory is "
                "free on this host. Name less, or leave it out."
            )
        if num_replicas > 1:
            # Each would otherwise take its share of all that is free.
            num_bytes = num_bytes or int(CHECKPOINT_SHARE * free)
    if own["checkpoint_dir"]:
        own["checkpoint_dir"] = str(_folder(own["checkpoint_dir"], own["checkpoint_dir_bytes"]))
    return {
        "checkpoint": own["checkpoint"],
        "checkpoint_online": online,
        "checkpoint_bytes": num_bytes // num_replicas,
        "checkpoint_dir": own["checkpoint_dir"] or "",
        "checkpoint_dir_bytes": (own["checkpoint_dir_bytes"] or 0) // num_replicas,
    }


def _check_together(own: dict[str, Any]) -> None:
    folder, size = own["checkpoint_dir"], own["checkpoint_dir_bytes"]
    if bool(folder) != bool(size):
        missing = "--checkpoint-dir" if size else "--checkpoint-dir-bytes"
        raise BadInputError(f"{missing} is missing: a tier on disk needs a folder and a size.")
    if own["checkpoint"] == "off" and (folder or own["checkpoint_bytes"]):
        named = "--checkpoint-dir" if folder else "--checkpoint-bytes"
        raise BadInputError(f"{named} has no use with --checkpoint off. Leave one of them out.")


def _folder(text: str, num_bytes: int) -> Path:
    from conserve.engine.checkpoint.disk import why_unusable

    folder = Path(text).expanduser().absolute()
    if why := why_unusable(folder, num_bytes):
        raise BadInputError(f"--checkpoint-dir {folder} {why}. Name another folder or a size.")
    return folder


def describe(settings: dict[str, Any], free_bytes: Callable[[], int]) -> str:
    """For the first lines at start."""
    if settings["checkpoint"] == "off":
        return "off: displaced offline requests compute again"
    size = settings["checkpoint_bytes"]
    room = gib(size, 2) if size else f"up to {gib(int(CHECKPOINT_SHARE * free_bytes()), 2)}"
    text = f"{settings['checkpoint']}, in {room} of host memory"
    if settings["checkpoint_dir"]:
        text += f" and {gib(settings['checkpoint_dir_bytes'], 2)} in {settings['checkpoint_dir']}"
    return text
