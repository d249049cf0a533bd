"""What `conserve doctor MODEL` says of a model without loading it is what start says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from conserve.engine.abilities import abilities
from conserve.engine.settings import EngineSettings
from conserve.server.doctor.finding import Level
from conserve.server.doctor.model import model
from tests.engine.engine import TINY, make_scheduler

pytestmark = pytest.mark.engine


def test_a_model_has_the_abilities_that_start_says(tmp_path: Path) -> None:
    """Stops are switched off, so that one thing is off."""
    (tmp_path / "scheduler").mkdir()
    settings = EngineSettings(profile_seconds=0, stop="off")
    at_start = [
        str(each) for each in abilities(make_scheduler(tmp_path / "scheduler", settings=settings))
    ]
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"max_position_embeddings": 512}))
    ours = json.dumps({"conserve": {"stop": "off"}})
    words = [str(tmp_path), "--skip-tokenizer-init", "--enforce-eager", "--additional-config", ours]
    findings = list(model([*words, "--kv-cache-memory-bytes", str(1 << 20)]))
    said = {each.name: each for each in findings}
    judged = [each for each in findings if each.level is not Level.FACT]
    assert [f"{each.name}: {each.text}" for each in judged] == at_start
    assert said["stops"].level is Level.WARNING
    assert said["checkpoints"].level is Level.OK
    assert said["architecture"].text == "LlamaForCausalLM"
    assert said["layers"].text == str(TINY["num_hidden_layers"])
