"""The input file of a command, whatever is given as one: a path, a pipe, or `-`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, BinaryIO
from urllib.parse import urlsplit

import typer

from conserve.batch.jsonl import request_in, why_not_utf8
from conserve.batch.rules import MAX_LINE_BYTES
from conserve.batch.wire import ENDPOINTS
from conserve.cli.failures import fail


def _given(text: str) -> Path:
    file = Path(text)
    if text != "-" and not file.exists():
        raise typer.BadParameter(f"there is no file {text!r}")
    if file.is_dir():
        raise typer.BadParameter(f"{text!r} is a folder")
    return file


FileArgument = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", parser=_given, help="One request a line (JSONL); - is standard input."
    ),
]


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The file at its start, to be read more than once: what comes through a pipe is copied
    first."""
    if str(file) == "-" and sys.stdin is None:
        raise fail("-: standard input is closed")
    try:
        source = sys.stdin.buffer if str(file) == "-" else file.open("rb")
        readable = source if source.seekable() else _copy(source)
    except OSError as error:
        raise fail(f"{file}: {error.strerror}") from None
    with readable:
        yield readable


def _copy(source: BinaryIO) -> BinaryIO:
    copy = TemporaryFile()  # noqa: SIM115 - `opened` closes it
    with source:
        shutil.copyfileobj(source, copy)
    copy.seek(0)
    return copy


def name_of(file: Path) -> str:
    """What the upload is called."""
    return file.name if file.is_file() else "stdin.jsonl"


def endpoint_for(file: Path, handle: BinaryIO, given: str | None) -> str:
    """Where the lines go, which is the first one's url; it must be `given` where that is.

    Ends the command where a server that has the endpoint would refuse the lines.
    """
    url = _first_url(file, handle)
    if url is None and given is None:
        raise fail(f"{file}: the first line names no url; see `conserve batch validate`")
    if url is not None and (right := _meant(url)) != url:
        raise fail(f"{file}: the first line's url is {url!r}; it must be {right}")
    if None not in (url, given) and url != given:
        raise fail(f"{file}: the first line's url is {url!r}, and --endpoint is {given!r}")
    return given or url or ""


def endpoint_to_check(file: Path, handle: BinaryIO, given: str | None) -> str:
    """As `endpoint_for`; where the first line names none, which is then found wrong by itself, that
    of another line, or any."""
    if given is None and _first_url(file, handle) is None:
        named = next((url for url in _urls(file, handle) if url in ENDPOINTS), ENDPOINTS[0])
        handle.seek(0)
        return named
    return endpoint_for(file, handle, given)


def _first_url(file: Path, handle: BinaryIO) -> str | None:
    """The url that the first request names, if any; `handle` is at its start again."""
    first = next(_urls(file, handle), None)
    handle.seek(0)
    return first


def _urls(file: Path, handle: BinaryIO) -> Iterator[str | None]:
    """What each request names, if anything."""
    for index, line in enumerate(iter(lambda: handle.readline(MAX_LINE_BYTES), b"")):
        if index == 0 and (reason := why_not_utf8(line)):
            raise fail(f"{file} {reason}")
        if request := request_in(line):
            yield _url_in(request)


def _url_in(request: bytes) -> str | None:
    try:
        # Python makes no whole number of more than 4,300 digits, and a body may hold any.
        return str(json.loads(request, parse_int=float)["url"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _meant(url: str) -> str:
    """The endpoint that a url in another dialect means: Azure leaves out /v1, others write the
    server's address before it, or a slash behind. Any other url is what it is."""
    path = urlsplit(url).path.rstrip("/")
    for endpoint in ENDPOINTS:
        if path.endswith(endpoint) or f"/v1{path}" == endpoint:
            return endpoint
    return url
