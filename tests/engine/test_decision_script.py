"""The scripts that time the engine room have requests with every field that it reads."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.engine


def test_every_scene_can_be_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    script: Any = import_module("decision_time")
    scenes = script.scenes(64, 100, 32)
    sys.modules.pop("decision_time")
    for scene in scenes.values():
        snapshot = scene.snapshot()
        assert snapshot.running or snapshot.waiting_offline
        assert script.measure(scene, 2, 1)["decide_us"] > 0


def test_a_request_can_let_go_of_its_blocks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    script: Any = import_module("free_queue_time")
    for name in ("free_queue_time", "decision_time"):
        sys.modules.pop(name)
    monkeypatch.setattr(sys, "argv", ["free_queue_time.py", "--calls", "1", "--repeats", "1"])
    script.main()
    assert len(capsys.readouterr().out.splitlines()) == 3
