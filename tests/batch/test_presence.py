"""Who is dead by its lock file: a worker of this machine, seen through the same mount, and nobody
else, wherever the folder lies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

import pytest

from conserve.batch import presence
from conserve.batch.presence import STALE_S, Presence, is_gone, sweep


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "workers"


def die(worker: Presence) -> None:
    """As a process does: the kernel closes what it has."""
    worker._handle.close()


def test_it_is_gone_when_its_process_has_ended(folder: Path) -> None:
    worker = Presence(folder, "w")
    assert not is_gone(folder, "w")
    die(worker)
    assert is_gone(folder, "w")
    worker.leave()
    assert not is_gone(folder, "w"), "it has left no file: its lease tells"


def test_a_lock_that_wants_a_file_open_for_writing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS does."""
    lock = fcntl.flock

    def on_nfs(handle: IO[Any], operation: int) -> None:
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        if operation & fcntl.LOCK_EX and flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        lock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", on_nfs)
    worker = Presence(folder, "w")
    assert not is_gone(folder, "w")
    die(worker)
    assert is_gone(folder, "w")


def anybody_may(_handle: IO[Any], _operation: int) -> None:
    """A lock that is known to one machine, or one mount, alone: others have it, too."""


def test_a_lock_of_another_machine_tells_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where both share a disk of a network that keeps locks to each."""
    monkeypatch.setattr(fcntl, "flock", anybody_may)
    worker = Presence(folder, "w")
    assert is_gone(folder, "w"), "control: of this machine it is believed"
    there = tmp_path / "boot_id"
    there.write_text("another\n")
    monkeypatch.setattr(presence, "BOOT_ID", there)
    assert not is_gone(folder, "w")
    worker.leave()


def test_a_lock_through_another_mount_tells_nothing(folder: Path) -> None:
    """As a second container's, which mounts the same storage for itself."""
    worker = Presence(folder, "w")
    kernel, device = (folder / "w").read_text().split()
    assert int(device) == folder.stat().st_dev
    (folder / "w").write_text(f"{kernel} {int(device) + 1}")
    die(worker)
    assert not is_gone(folder, "w")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe"])
def test_a_file_that_says_nothing_of_its_place(folder: Path, content: bytes) -> None:
    """Of an older ConServe, or of one whose disk was full."""
    die(Presence(folder, "w"))
    (folder / "w").write_bytes(content)
    assert not is_gone(folder, "w")


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_a_folder_without_locks_leaves_it_to_the_lease(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(_handle: IO[Any], _operation: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    worker = Presence(folder, "w")
    assert not is_gone(folder, "w")
    worker.leave()


def test_without_a_boot_id_the_host_has_a_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "BOOT_ID", folder / "none")
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    die(Presence(folder, "w"))
    assert is_gone(folder, "w")
    monkeypatch.setattr(socket, "gethostname", lambda: "there")
    assert not is_gone(folder, "w")


def left(folder: Path, name: str, age_s: float = STALE_S + 60) -> Presence:
    worker = Presence(folder, name)
    moment = time.time() - age_s
    os.utime(folder / name, (moment, moment))
    return worker


def test_what_the_buried_left_is_swept(folder: Path) -> None:
    """And nothing of the living: those that the database knows, those that are about to tell it,
    and those that hold their file, as others' of another database."""
    die(left(folder, "worker-buried"))
    die(left(folder, "worker-known"))
    die(left(folder, "worker-new", age_s=60))
    die(left(folder, "notes"))
    holding = left(folder, "worker-holding")
    sweep(folder, {"worker-known"})
    assert set(os.listdir(folder)) == {"worker-known", "worker-new", "worker-holding", "notes"}
    holding.leave()
    sweep(folder, ())
    assert set(os.listdir(folder)) == {"worker-new", "notes"}


def test_a_file_that_cannot_be_swept_keeps_no_other(folder: Path) -> None:
    (folder / "worker-a").mkdir(parents=True)
    moment = time.time() - STALE_S - 60
    os.utime(folder / "worker-a", (moment, moment))
    die(left(folder, "worker-b"))
    sweep(folder, ())
    assert os.listdir(folder) == ["worker-a"]


def test_a_folder_without_locks_is_swept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_handle: IO[Any], _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    die(left(folder, "worker-buried"))
    sweep(folder, ())
    assert os.listdir(folder) == []
