"""Programs of Debian's packages, unpacked into this environment: nothing is installed on the
machine, no service starts, and no root is needed where the package lists are at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


def program(package: str, path: str) -> str:
    """The machine's own program, or the package's at `path` (such as usr/bin/promtool). Skips the
    test, saying why, where neither can be had. For programs that need no library of another
    package."""
    found = shutil.which(Path(path).name)
    if found is not None:
        return found
    folder = Path(sys.prefix) / "debian" / package
    if not folder.exists():
        _unpack(package, folder)
    return str(folder / path)


def _unpack(package: str, folder: Path) -> None:
    name = f"no {package} is installed"
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip(f"{name}, and this is no Debian to take its package from")
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        download = ["apt-get", "download", package]
        done = _run(download, made)
        if done.returncode and os.getuid() == 0:  # only root may fetch the package lists
            _run(["apt-get", "update"], made)
            done = _run(download, made)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"{name}, and `apt-get download {package}` failed: {reason}")
        (file,) = Path(made).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(file), f"{made}/root"], check=True)
        os.replace(f"{made}/root", folder)


def _run(words: list[str], folder: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
