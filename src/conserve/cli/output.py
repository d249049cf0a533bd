"""Where a command's output goes: standard output, or a file that is there whole or not at all."""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from conserve.cli.failures import fail

READER_GONE = 128 + signal.SIGPIPE
"""Exit status where whoever read our output has gone, as of a program that SIGPIPE ends."""
WIDE = 140
"""Columns of a table that is not shown in a terminal: room for its longest line."""
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
PLAIN = dict(zip("✓✗→▁▂▃▄▅▆▇█", "+x>_.-~=+*#", strict=True))
"""What stands for our marks and bars where the terminal's encoding has none."""
DESCRIPTOR = re.compile(r"/proc/[^/]+/(task/[^/]+/)?fd(/|$)")


class Output(Console):
    """A console on standard output. A reader that has gone is `standard_output`'s affair."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def for_tables(columns: int = WIDE) -> Output:
    """On a terminal as wide as that is; piped elsewhere, of so many columns."""
    return Output(width=None if sys.stdout.isatty() else columns, highlight=False)


def print_table(*tables: Table) -> None:
    """The first of them that fits, or the last: nothing is cut off, a terminal that is narrower
    wraps its lines."""
    console = for_tables()
    for table in tables:
        if _least_width(console, table) <= console.width:
            break
    console.width = max(console.width, _least_width(console, table))
    console.print(table)


def _least_width(console: Console, table: Table) -> int:
    unbounded = console.options.update(max_width=10_000)
    return Measurement.get(console, unbounded, table).minimum


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter, "?") for letter in letters), error.end


codecs.register_error("conserve-plain", _plainly)


def _print_in_any_encoding() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="conserve-plain")


@contextmanager
def standard_output() -> Iterator[None]:
    """Around a command: one that cannot print ends without a traceback, and in silence where
    the reader has gone. A letter that the terminal does not have is another there."""
    _print_in_any_encoding()
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _drop_the_rest()
        raise typer.Exit(READER_GONE) from None
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        _drop_the_rest()
        raise fail(f"cannot write: {error.strerror}") from None


def _drop_the_rest() -> None:
    """What is still in the buffer would fail again when Python ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """What is written in the block, at `path`. A file changes only once all of it is there, and
    a link goes on leading where it led; a device or a pipe is written as it comes.

    Ends the command with one line where that cannot be.
    """
    try:
        with open(path, "wb") if _is_no_file(path) else _replacing(path) as target:
            yield target
    except BrokenPipeError:
        raise typer.Exit(READER_GONE) from None
    except OSError as error:
        raise fail(f"cannot write {path}: {error.strerror}") from None


def _is_no_file(path: Path) -> bool:
    """Whether there is something at `path` that a file must not take the place of."""
    if not path.exists():
        return False
    # /dev/stdout may be a file, which others go on writing to.
    return not path.is_file() or any(
        DESCRIPTOR.match(place) for place in (os.path.realpath(path.parent), _link(path))
    )


def _link(path: Path) -> str:
    return os.readlink(path) if path.is_symlink() else ""


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    place = Path(os.path.realpath(path))
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if place.exists() and not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    part = place.with_name(f".conserve-{uuid4().hex}.part")
    try:
        with part.open("xb") as target:
            yield target
        if place.exists():
            shutil.copymode(place, part)
        part.replace(place)
    finally:
        with suppress(OSError):
            part.unlink()
