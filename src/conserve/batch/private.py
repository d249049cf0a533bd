"""Files and folders that nobody but this user reads: uploads and results are other people's texts.

Whatever the umask says, and also where an earlier server left them open.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

FOLDER, FILE = 0o700, 0o600


def make_folder(folder: Path) -> None:
    """Make it, or, where there is one, take it from everybody else. Raises OSError."""
    folder.mkdir(FOLDER, parents=True, exist_ok=True)
    _close(folder, FOLDER)


def make_file(file: Path) -> None:
    """The same for a file, which keeps what it holds. Raises OSError."""
    os.close(open_private(str(file), os.O_RDWR | os.O_CREAT))
    _close(file, FILE)


def open_private(name: str, flags: int) -> int:
    """An `opener` for `open`."""
    return os.open(name, flags, FILE)


def _close(path: Path, mode: int) -> None:
    with suppress(PermissionError):  # another user's, who shares it with us
        if path.stat().st_mode & 0o777 & ~mode:
            path.chmod(mode)
