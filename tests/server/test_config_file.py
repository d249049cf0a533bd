"""`--config`: a YAML file's entries become the flags they are, or an error that names them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from conserve.server.errors import BadInputError
from conserve.server.start.config_file import expand


def parser() -> argparse.ArgumentParser:
    """A flag of each kind that vLLM's parser has."""
    made = argparse.ArgumentParser()
    made.add_argument("--port", type=int)
    made.add_argument("--checkpoint")
    made.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    made.add_argument("--no-batches", action="store_true")
    made.add_argument("--api-key", nargs="+")
    made.add_argument("--allowed-origins")
    made.add_argument("--middleware", action="append")
    made.add_argument("--hf-token", nargs="?", const=True)
    made.add_argument("--additional-config")
    return made


def expanded(folder: Path, text: str, *arguments: str) -> list[str]:
    file = folder / "serve.yaml"
    file.write_text(text)
    words = [f"--config={file}", *arguments]
    return expand(words, parser()._option_string_actions)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("port: 8000", ["--port", "8000"]),
        ("port:", ["--port", "None"]),
        ("checkpoint: 2026-01-02", ["--checkpoint", "2026-01-02"]),
        ("additional-config: {a: 2026-01-02}", ["--additional-config", '{"a": "2026-01-02"}']),
        ("checkpoint: off", ["--checkpoint", "off"]),
        ("checkpoint: No", ["--checkpoint", "No"]),
        ("checkpoint: 'off'", ["--checkpoint", "off"]),
        ("enable-prefix-caching: off", ["--no-enable-prefix-caching"]),
        ("enable_prefix_caching: false", ["--no-enable-prefix-caching"]),
        ("enable-prefix-caching: yes", ["--enable-prefix-caching"]),
        ("no-batches: true", ["--no-batches"]),
        ("no-batches: false", []),
        ("api-key: [a, b]", ["--api-key", "a", "b"]),
        ("api-key: []", []),
        ("api-key: 12", ["--api-key", "12"]),
        ("api-key: 0123", ["--api-key", "0123"]),
        ("api-key: [0x1f, 1_0, b]", ["--api-key", "0x1f", "1_0", "b"]),
        ("<<: {api-key: [a, 2]}", ["--api-key", "a", "2"]),
        ("middleware: [1.10]", ["--middleware", "1.10"]),
        ("checkpoint: 1.10", ["--checkpoint", "1.10"]),
        ("checkpoint: 12:30", ["--checkpoint", "12:30"]),
        ("allowed-origins: [1.10]", ["--allowed-origins", "[1.1]"]),
        ("allowed-origins: ['*']", ["--allowed-origins", '["*"]']),
        ("middleware: [a.b, c.d]", ["--middleware", "a.b", "--middleware", "c.d"]),
        ("hf-token: true", ["--hf-token"]),
        ("hf-token: false", []),
        ("additional-config: {a: {b: 1}}", ["--additional-config", '{"a": {"b": 1}}']),
        ("compilation-config.mode: 3", ["--compilation-config.mode", "3"]),
        ("\ufeffport: 8000", ["--port", "8000"]),
    ],
)
def test_an_entry_is_its_flag(tmp_path: Path, entry: str, words: list[str]) -> None:
    assert expanded(tmp_path, entry) == words


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<<: {checkpoint: false}", "checkpoint takes a value, not false"),
        ("checkpoint: false", "checkpoint takes a value, not false"),
        ("port: true", "port takes a value, not true"),
        ("no-batches: maybe", "no-batches must be true or false, not maybe"),
        ("- port", "must hold flags"),
        ("", "must hold flags"),
        ("1: 2", "must hold flags"),
        ("port: [", "is no YAML"),
    ],
)
def test_what_is_no_flag_is_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(BadInputError, match=r"serve\.yaml") as caught:
        expanded(tmp_path, text)
    assert told in str(caught.value)


@pytest.mark.parametrize("words", [["--config"], ["--config", "absent.yaml"], ["--config="]])
def test_a_file_that_is_not_there_is_named(words: list[str]) -> None:
    with pytest.raises(BadInputError, match="--config"):
        expand(words, {})


def test_one_file_is_enough() -> None:
    with pytest.raises(BadInputError, match="one YAML file"):
        expand(["--config", "a.yaml", "--config=b.yaml"], {})


def test_what_is_given_beside_it_comes_later_and_wins(tmp_path: Path) -> None:
    words = expanded(tmp_path, "port: 1\ncheckpoint: swap", "--port", "2")
    assert words == ["--port", "1", "--checkpoint", "swap", "--port", "2"]
    assert parser().parse_args(words).port == 2


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("port: 1", [], ["--port", "1"]),
        ("model: org/m\nport: 1", [], ["org/m", "--port", "1"]),
        ("model:", [], []),
        ("model: ~/m", [], [str(Path.home() / "m")]),
        ("model: org/m\nport: 1", ["--model", "mine"], ["--port", "1", "--model", "mine"]),
    ],
)
def test_a_model_comes_first_if_there_is_one(
    tmp_path: Path, text: str, arguments: list[str], words: list[str]
) -> None:
    assert expanded(tmp_path, text, *arguments) == words


def test_a_model_named_before_it_wins(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: org/m\nport: 1")
    words = expand(["mine", "--config", str(file), "--no-batches"], parser()._option_string_actions)
    assert words == ["mine", "--port", "1", "--no-batches"]
