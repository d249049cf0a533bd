"""What `-o` writes to keeps its kind, and changes only once all of it is there; any terminal can be
written to."""

from __future__ import annotations

import os
import re
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer

from conserve.cli.output import READER_GONE, written

CONTENT = b"line\n" * 40_000


def write(path: Path) -> None:
    with written(path) as target:
        target.write(CONTENT)


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which writing there ends."""
    with pytest.raises(typer.Exit) as ended:
        write(path)
    assert ended.value.exit_code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@contextmanager
def reading(path: Path) -> Iterator[list[bytes]]:
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()))
    reader.start()
    yield found
    reader.join()


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_bytes(b"old")
    file.chmod(0o640)
    write(file)
    assert file.read_bytes() == CONTENT
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_two_at_once_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two containers that share a folder, too, where both processes have the same number."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with written(tmp_path / "a") as first, written(tmp_path / "b") as second:
        first.write(b"a")
        second.write(b"b")
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"a", b"b"]


def test_what_breaks_off_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_bytes(b"old")

    def broken_off() -> None:
        with written(file) as target:
            target.write(CONTENT)
            raise typer.Exit(1)

    with pytest.raises(typer.Exit):
        broken_off()
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.jsonl"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_leads_where_it_led(tmp_path: Path, there: bool) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    real, link = tmp_path / "real/out.jsonl", tmp_path / "links/latest"
    link.symlink_to("../real/out.jsonl")
    if there:
        real.write_bytes(b"old")
    write(link)
    assert link.is_symlink()
    assert not real.is_symlink()
    assert real.read_bytes() == CONTENT
    assert os.listdir(tmp_path / "real") == ["out.jsonl"]


@pytest.mark.parametrize("linked", [True, False])
def test_a_pipe_is_written_through(tmp_path: Path, linked: bool) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    with reading(pipe) as found:
        write(link if linked else pipe)
    assert found == [CONTENT]
    assert pipe.is_fifo()
    assert link.is_symlink()


def test_a_device_is_written_through() -> None:
    ours, theirs = os.openpty()
    name = Path(os.ttyname(theirs))
    with written(name) as target:
        target.write(b"hello")
    assert os.read(ours, 5) == b"hello"
    assert name.is_char_device()
    os.close(ours)
    os.close(theirs)


def test_a_descriptor_that_is_a_file_is_not_replaced(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+b") as log:
        for name in (f"/dev/fd/{log.fileno()}", f"/proc/self/fd/{log.fileno()}"):
            with written(Path(name)) as target:
                target.write(b"hello")
            assert os.path.samestat(os.fstat(log.fileno()), os.stat(tmp_path / "log"))
            assert log.read() == b"hello"
            log.seek(0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/out.jsonl", "No such file or directory"),
        ("folder", "Is a directory"),
        ("file/out.jsonl", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_that_cannot_be_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(os.listdir(tmp_path))
    assert refused(tmp_path / name, capsys).endswith(f"{name}: {reason}")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_file_that_may_not_be_written_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.jsonl"
    file.write_bytes(b"old")
    # root may write anything.
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "Permission denied" in refused(file, capsys)
    assert file.read_bytes() == b"old"


def test_a_full_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(Path("/dev/full"), capsys) == (
        "error: cannot write /dev/full: No space left on device"
    )


def test_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.jsonl"
    file.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(CONTENT) // 2, hard))
    try:
        assert "File too large" in refused(file, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_pipe_whose_reader_goes_ends_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ours = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def left_alone() -> None:
        with written(pipe) as target:
            os.close(ours)
            target.write(CONTENT)

    with pytest.raises(typer.Exit) as ended:
        left_alone()
    assert ended.value.exit_code == READER_GONE
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_of_another_encoding_gets_other_letters(encoding: str) -> None:
    text = "✓ ✗ → ▁▂▃▄▅▆▇█ 日本 end"
    code = f"from conserve.cli.output import *\nwith standard_output():\n    print({text!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        encoding=encoding,
    )
    assert (done.returncode, done.stderr) == (0, "")
    plain = "+ x > _.-~=+*# ?? end"
    assert done.stdout == f"{text if encoding == 'utf-8' else plain}\n"


def test_doctor_speaks_to_a_terminal_without_its_marks() -> None:
    main = "from conserve.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", main, "doctor"],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        encoding="latin-1",
    )
    assert "Traceback" not in done.stderr
    assert re.search(r"^\+ ", done.stdout, re.MULTILINE)
