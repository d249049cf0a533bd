"""The models that `scarce` is run on beside the default one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoConfig

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "model_shapes.py"


@pytest.mark.engine
@pytest.mark.parametrize("name", ["gemma3", "gpt-oss", "qwen3-next"])
def test_a_folder_has_a_configuration_and_a_tokenizer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("model_shapes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    shapes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shapes)
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(shapes, "default_model", lambda: tmp_path / "default")
    folder = shapes.write_shape(name, tmp_path / name)
    config = AutoConfig.from_pretrained(folder)
    assert len(set(config.layer_types)) == 2, "layers of both kinds"
    assert (folder / "tokenizer.json").read_text() == "{}"
