"""Servers and keys that cannot be: one line that says which, and never the key itself."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from conserve.cli.main import app
from tests.cli.test_proxies import answering

COMMANDS: list[list[str]] = [["batch", "list", "--url"], ["usage", "--url"], ["top", "--once"]]
NOWHERE = "http://127.0.0.1:9"
commands = pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])


def refused(words: list[str], **options: Any) -> str:
    done = CliRunner().invoke(app, words, **options)
    assert (done.exit_code, type(done.exception)) == (1, SystemExit), done.exception
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: ")
    return said.removeprefix("error: ")


@commands
@pytest.mark.parametrize("url", ["http://127.0.0.1:port", "http://[::1", "http://a\tb"])
def test_what_is_no_url(words: list[str], url: str) -> None:
    assert "is no URL" in refused([*words, url])


@commands
@pytest.mark.parametrize("key", ["schlüssel", "two\nlines", "a\x7fb"])
def test_what_is_no_key(words: list[str], key: str) -> None:
    said = refused([*words, NOWHERE], env={"OPENAI_API_KEY": key})
    assert said == "--api-key or OPENAI_API_KEY has characters that no header may have"


@commands
def test_a_key_from_a_file_may_end_its_line(words: list[str]) -> None:
    with answering() as (url, asked):
        CliRunner().invoke(app, [*words, url], env={"OPENAI_API_KEY": "key\n"})
    assert len(asked) == 1


@commands
def test_a_password_in_an_address_is_not_said(words: list[str]) -> None:
    said = refused([*words, "http://bob:hunter2@127.0.0.1:9"])
    assert said.startswith("http://bob:***@127.0.0.1:9")
    assert "hunter2" not in said
