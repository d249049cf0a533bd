"""The parts of benchmarks/gpu that need neither a GPU nor vLLM."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from conserve.bench.arms import ARMS
from conserve.bench.prompts import Vocabulary
from conserve.sim import profiles
from conserve.workload import load_scenario

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.1-8b"])
def test_the_models_have_the_shapes_that_are_simulated(name: str, script: Any) -> None:
    shape = script("models").SHAPES[name]
    table = tomllib.loads(
        Path(profiles.__file__).with_suffix("").joinpath("models.toml").read_text()
    )
    simulated = table[name]
    assert shape["num_hidden_layers"] == simulated["num_layers"]
    assert shape["hidden_size"] == simulated["hidden"]
    assert shape["num_attention_heads"] == simulated["num_heads"]
    assert shape["num_key_value_heads"] == simulated["num_kv_heads"]
    assert shape["intermediate_size"] == simulated["intermediate"]
    assert shape["vocab_size"] == simulated["vocabulary"]


def test_a_written_model_has_words_for_prompts(tmp_path: Path, script: Any) -> None:
    folder = script("models").write_shape("tiny", tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    words = Vocabulary.of_model(str(folder))._word_ids
    assert len(words) > 1000
    assert max(words) < config["vocab_size"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("scenarios/*.toml")), ids=lambda p: p.stem)
def test_every_scenario_can_be_run(path: Path) -> None:
    scenario = load_scenario(path)
    assert set(scenario.arms) <= set(ARMS)
    assert scenario.seeds == (1,) or scenario.name == "tiny"


def test_the_stages_have_their_scenarios_and_are_in_the_readme(script: Any) -> None:
    run = script("run")
    readme = (FOLDER / "README.md").read_text()
    assert [name for name in run.STAGES if f"`{name}`" not in readme] == []
    for name in ("burst", "gamma", "azure-conv"):
        assert name in run.STAGES
        for variant in (name, f"{name}-4k"):
            assert (FOLDER / "scenarios" / f"{variant}.toml").is_file()
    assert set(run.ARMS) <= set(ARMS)
    assert set(run.ENGINE_PARTS) <= set(run.STAGES)


@pytest.mark.parametrize(
    ("requirement", "name", "extras"),
    [
        ("sqlalchemy[asyncio]>=2.0.40", "sqlalchemy", {"asyncio"}),
        ("Typing_Extensions (>=4.6)", "typing-extensions", set()),
        ("uvicorn[standard, other] ; python_version > '3'", "uvicorn", {"standard", "other"}),
    ],
)
def test_requirements_are_read(requirement: str, name: str, extras: set[str], script: Any) -> None:
    assert script("pack")._split(requirement) == (name, frozenset(extras))


def test_every_dependency_is_pinned_for_the_pack(script: Any) -> None:
    pack = script("pack")
    lines = (pack.ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    pinned = {pack._name_of(line) for line in lines if pack.PIN.match(line)}
    assert [name for name in pack._wanted(set()) if pack._name_of(name) not in pinned] == []
