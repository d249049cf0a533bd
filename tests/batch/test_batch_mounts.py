"""Batches where folders are mounts of their own, as a container's volumes are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# A mount that nobody else sees, by a user who is root in it alone.
APART = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNTED = """for each in files staging; do mount --bind $each $each; done && exec "$0" -c "$1" """
KEEP = """
import asyncio
from pathlib import Path
from conserve.batch.contents import FileContents

here = Path.cwd()
assert (here / "staging").stat().st_dev == (here / "files").stat().st_dev
contents = FileContents(f"file://{here}/files", here / "staging")
staged = here / "staging" / "one"
staged.write_bytes(b"line")
asyncio.run(contents.keep(staged, "file-1"))
"""


def can_mount(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    words = [*APART, "mount", "--bind", str(folder), str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_a_file_moves_between_two_mounts_of_one_disk(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("this system has no mount namespaces for its users")
    for name in ("files", "staging"):
        (tmp_path / name).mkdir()
    words = [*APART, "sh", "-c", MOUNTED, sys.executable, KEEP]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "files" / "file-1").read_bytes() == b"line"
    assert os.listdir(tmp_path / "staging") == []
