"""What start says is on and off, a line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.engine import abilities as module
from conserve.engine.settings import EngineSettings
from tests.engine.engine import make_scheduler

pytestmark = pytest.mark.engine


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str, *arguments: Any) -> None:
        self.lines.append(text % arguments)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(module, "logger", log)
    return log


def test_start_says_what_is_on(tmp_path: Path, log: Log) -> None:
    make_scheduler(tmp_path)
    assert log.lines == [
        "ConServe: stops: on: a step makes room for an online request between two layers",
        "ConServe: checkpoints: on: of offline requests and conversations (incremental), once "
        "there is memory for them",
    ]


def test_start_says_what_is_off_and_why(tmp_path: Path, log: Log) -> None:
    settings = EngineSettings(profile_seconds=0, stop="off", checkpoint="off")
    make_scheduler(tmp_path, settings=settings, chunked_prefill=False, num_spec_tokens=3)
    assert log.lines == [
        "ConServe: stops: off: switched off (stop: off); an online request waits for the step that "
        "runs",
        "ConServe: checkpoints: off: switched off (checkpoint: off); displaced requests compute "
        "again",
        "ConServe: drafts: on: 3 a request and step",
        "ConServe: parts of prompts: off: vLLM cuts no prompt of this model; a prompt is computed "
        "in one step",
    ]


def test_conversations_are_named_only_where_they_are_kept(tmp_path: Path, log: Log) -> None:
    settings = EngineSettings(profile_seconds=0, checkpoint_online=False)
    make_scheduler(tmp_path, settings=settings)
    (line,) = (line for line in log.lines if "checkpoints" in line)
    assert "of offline requests (incremental)" in line
