"""The script that times decisions has requests with every field that the engine room reads."""

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
