"""What start says is on and off, a line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from conserve.core.kv_groups import KVGroup
from conserve.engine import abilities as module
from conserve.engine.settings import EngineSettings
from tests.engine.engine import BLOCK_SIZE, make_scheduler

pytestmark = pytest.mark.engine

FULL = KVGroup(BLOCK_SIZE)
STATE_AT_ENDS = KVGroup(BLOCK_SIZE, is_state=True)
STATE_OF_A_REQUEST = KVGroup(512, is_state=True)


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
        "ConServe: checkpoints: on: of offline requests (incremental), once there is memory for "
        "them",
        "ConServe: conversations: on: what online requests leave is kept on the host, for their "
        "next turns",
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


@pytest.mark.parametrize(
    ("settings", "groups", "why"),
    [
        ({"checkpoint_online": False}, [FULL], "checkpoint_online: false"),
        ({"checkpoint": "swap"}, [FULL], "checkpoint: swap"),
        ({}, [FULL, STATE_OF_A_REQUEST], "prefix caching, which is off"),
        ({}, [FULL, STATE_AT_ENDS], "recurrent state"),
    ],
    ids=["switched off", "swap", "no prefix caching", "recurrent layers"],
)
def test_start_says_why_conversations_are_not_kept(
    tmp_path: Path, log: Log, settings: dict[str, Any], groups: list[KVGroup], why: str
) -> None:
    made = make_scheduler(
        tmp_path, settings=EngineSettings(profile_seconds=0, **settings), groups=groups
    )
    assert made.checkpointer.conversations is None
    (line,) = (line for line in log.lines if "conversations" in line)
    assert "conversations: off" in line
    assert why in line
