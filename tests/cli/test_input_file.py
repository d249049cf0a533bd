"""A file, a pipe or standard input; and urls that no server takes, before anything is sent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from conserve.cli.batch import app
from conserve.cli.input_file import endpoint_for, name_of, opened
from tests.batch.builders import CHAT, jsonl, line, numbered


def told(file: Path, given: str | None, capsys: pytest.CaptureFixture[str]) -> str:
    """The endpoint, or the one line with which the command ends."""
    with opened(file) as handle:
        try:
            where = endpoint_for(file, handle, given)
        except typer.Exit:
            (line,) = capsys.readouterr().err.splitlines()
            return line
        assert handle.read() == file.read_bytes()
        return where


@pytest.mark.parametrize("head", [b"", b"\xef\xbb\xbf", b"\r\n \n", b"\xef\xbb\xbf\n"])
def test_the_first_request_names_the_endpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], head: bytes
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(head + numbered(2))
    assert told(file, None, capsys) == CHAT
    assert told(file, CHAT, capsys) == CHAT
    assert "--endpoint is '/v1/responses'" in told(file, "/v1/responses", capsys)


@pytest.mark.parametrize(
    ("url", "right"),
    [
        ("/chat/completions", CHAT),
        ("/completions", "/v1/completions"),
        ("/embeddings", "/v1/embeddings"),
        ("/v1/chat/completions/", CHAT),
        ("http://127.0.0.1:8000/v1/chat/completions", CHAT),
        ("https://host/openai/v1/responses?api-version=preview", "/v1/responses"),
    ],
)
def test_another_dialect_s_url_is_corrected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str, right: str
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl([line("a", url=url)]))
    for given in (None, right):
        assert told(file, given, capsys) == (
            f"error: {file}: the first line's url is {url!r}; it must be {right}"
        )


def test_an_endpoint_that_another_server_may_have_is_left_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl([line("a", url="/v1/moderations")]))
    assert told(file, None, capsys) == "/v1/moderations"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}\n", b"nothing\n", b"[" * 100_000])
def test_a_file_without_a_url_needs_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(content)
    assert "names no url" in told(file, None, capsys)
    assert told(file, CHAT, capsys) == CHAT


def test_another_encoding_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(numbered(2).decode().encode("utf-16"))
    assert told(file, CHAT, capsys).startswith(f"error: {file} is UTF-16")


def test_a_pipe_is_read_as_a_file(tmp_path: Path) -> None:
    pipe, content = tmp_path / "pipe", numbered(3000)
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    with opened(pipe) as handle:
        writer.join()
        assert endpoint_for(pipe, handle, None) == CHAT
        assert handle.read() == content
        handle.seek(0)
        assert json.loads(handle.readline())["url"] == CHAT
    assert name_of(pipe) == "stdin.jsonl"
    assert name_of(Path("-")) == "stdin.jsonl"


WINDOWS = jsonl([line("a")]).replace(b'"a"', "'ä'".replace("'", '"').encode("cp1252"))


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"\n\n", "empty_file"),
        (WINDOWS + numbered(1), "invalid_json_line"),
        (b"nothing\n" + numbered(1), "invalid_json_line"),
        (jsonl([line("a")]).rstrip() + jsonl([line("b")]), "invalid_json_line"),
        (b"[\n" + numbered(1), "invalid_request"),
        (b"{}\n" + jsonl([line("a", url="/v1/embeddings")]), "missing_required_parameter"),
        (b"{}\n" + jsonl([line("a", url="/nowhere")]), "missing_required_parameter"),
    ],
)
def test_validate_says_what_is_wrong_with_a_first_line_without_a_url(
    tmp_path: Path, content: bytes, code: str
) -> None:
    """It is where `submit` sends who has such a file."""
    file = tmp_path / "in.jsonl"
    file.write_bytes(content)
    done = CliRunner().invoke(app, ["validate", str(file)])
    assert done.exit_code == 1
    assert done.stdout.startswith(f"{file}:1: {code}: ")
    assert done.stderr == ""


def test_a_number_of_any_length_hides_no_url(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl([line("a")]).replace(b'"body"', b'"n": ' + b"9" * 5000 + b', "body"'))
    assert told(file, None, capsys) == CHAT


def test_standard_input_that_is_closed_is_named() -> None:
    command = [sys.executable, "-c", "from conserve.cli.main import main; main()"]
    words = ["batch", "validate", "-"]
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" <&-', "sh", *command, *words], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "error: -: standard input is closed\n")
