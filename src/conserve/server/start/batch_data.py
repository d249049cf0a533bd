"""Where `conserve serve` keeps files and batches; a place that cannot be is refused at once."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError
from pydantic_settings import SettingsError

from conserve.batch.errors import BatchSettingsError
from conserve.batch.private import FOLDER
from conserve.batch.settings import BatchSettings
from conserve.batch.stores import Stores
from conserve.server.errors import BadInputError

PREFIX = str(BatchSettings.model_config["env_prefix"])
DATA_DIR = f"{PREFIX}DATA_DIR"
"""Name of the environment variable that tells every API process."""

KEPT = ("batches.db*", "files", "staging", "workers")
"""What a server keeps in it, as patterns."""

OWNER_LIMITS = f"{PREFIX}OWNER_LIMITS"
FLAGS = {"owner_limits": "--owner-limits"}
"""Settings that an error calls by their flag."""


def settle_data_dir(flag: str | None, model: str) -> Path:
    """The data folder, made if need be: the flag's, else the environment's, else the model's own.

    Raises BadInputError where it cannot be written, or where another setting cannot work.
    """
    given = flag or os.environ.get(DATA_DIR)
    folder = Path(given).expanduser() if given else default_data_dir(model)
    folder = folder.absolute()
    _check_writable(folder)
    with settings_named():
        Stores(BatchSettings(data_dir=folder), time.time)
    return folder


@contextmanager
def settings_named() -> Iterator[None]:
    """Raises BadInputError, which calls a setting of the batch service that cannot work by its
    variable or flag."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        name = PREFIX + str(first["loc"][0]).upper()
        raise BadInputError(f"{name}: {first['msg']}, not {first['input']!r}.") from error
    except SettingsError as error:  # the one setting that is no plain word
        example = """'{"X-Gateway": "..."}'"""
        raise BadInputError(
            f"{PREFIX}REQUEST_HEADERS: must be a JSON object, such as {example}."
        ) from error
    except BatchSettingsError as error:
        name, _, reason = str(error).partition(" ")
        known_as = FLAGS.get(name, PREFIX + name.upper())
        raise BadInputError(f"{known_as} {reason}.") from error


def default_data_dir(model: str) -> Path:
    """`$XDG_DATA_HOME/conserve/MODEL`, or below `~/.local/share`. Each model has its own: a
    batch of one waits for ever where only another is served."""
    base = os.environ.get("XDG_DATA_HOME")
    home = Path(base) if base else Path.home() / ".local" / "share"
    name = re.sub(r"[^A-Za-z0-9._-]+", "--", model).strip("-.")
    return home / "conserve" / (name[-100:] or "model")


def _check_writable(folder: Path) -> None:
    """Others' things in it are nobody's concern, such as the `lost+found` of a disk of its own."""
    try:
        folder.mkdir(FOLDER, parents=True, exist_ok=True)
        ours = [path for name in KEPT for path in folder.glob(name)]
        for path in (folder, *ours):
            if not os.access(path, os.W_OK):
                raise PermissionError(None, "Permission denied", str(path))
    except OSError as error:
        raise BadInputError(
            f"--data-dir: {error.filename or folder} cannot be written: {error.strerror}. "
            "Name another folder, or serve no batches with --no-batches."
        ) from error
