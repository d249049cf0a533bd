"""The parts of benchmarks/gpu that need neither a GPU nor vLLM."""

from __future__ import annotations

import json
import re
import tarfile
import time
import tomllib
from pathlib import Path
from random import Random
from typing import Any
from zipfile import ZipFile

import pytest

from conserve.bench.arms import ARMS
from conserve.bench.prompts import Vocabulary
from conserve.sim import profiles
from conserve.workload import load_scenario

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


def test_the_model_has_the_shape_that_is_simulated(script: Any) -> None:
    shape = script("models").SHAPES["llama-3.1-8b"]
    table = tomllib.loads(
        Path(profiles.__file__).with_suffix("").joinpath("models.toml").read_text()
    )
    simulated = table["llama-3.1-8b"]
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
    assert scenario.seeds == (1,)


def test_the_stages_and_calls_are_in_the_readme(script: Any) -> None:
    run = script("run")
    readme = (FOLDER / "README.md").read_text()
    assert [name for name in run.STAGES if f"`{name}`" not in readme] == []
    assert {arm for arms in run.ARMS.values() for arm in arms} <= set(ARMS)
    assert set(run.LIMITS_S) == set(run.STAGES) - set(run.ENGINE_PARTS) | {"engine"}
    calls = (FOLDER / "call.sh").read_text()
    for number in range(1, script("rehearse").NUM_CALLS + 1):
        assert f"call.sh {number}`" in readme
        assert f"\n{number}) " in calls
    named = [name for name in run.STAGES if re.search(rf"\b{name}\b", calls)]
    assert named == list(run.STAGES), "every stage is in a call"


def test_a_late_program_is_ended_and_the_rest_is_kept(tmp_path: Path, script: Any) -> None:
    run = script("run")
    patient = run.Run(
        tmp_path, tiny=True, deadline_s=time.monotonic() + 60, bundle=tmp_path / "all.tar.gz"
    )
    (tmp_path / "found.json").write_text("{}")
    (tmp_path / "models").mkdir()
    (tmp_path / "took.json").write_text('{"earlier": 3.0}')
    waiting = tmp_path / "waiting.py"
    waiting.write_text("import threading; threading.Event().wait()")
    quick = tmp_path / "quick.py"
    quick.write_text("print('well')")
    patient.call_beside({"waiting": [str(waiting)], "quick": [str(quick)]}, 5.0)
    assert patient.notes == ["waiting: over time"]
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        names = set(tar.getnames())
    assert {"found.json", "took.json", "logs/waiting.log", "logs/quick.log"} <= names
    assert "models" not in names
    assert set(json.loads((tmp_path / "took.json").read_text())) == {"earlier", "waiting", "quick"}
    patient.deadline_s = time.monotonic()
    patient.call("other", str(quick), [], 60.0)
    assert patient.notes[-1] == "other: no time left"


def test_parts_come_out_as_they_went_in(tmp_path: Path, script: Any) -> None:
    """Several parts of one archive, less what is left out; a broken one is refused."""
    parts, unpack = script("parts"), script("unpack")
    wheel, site = tmp_path / "some-1-py3-none-any.whl", tmp_path / "site"
    noise = Random(1).randbytes(200_000)
    with ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/core.bin", noise)
        archive.writestr("vllm/_moe_C_stable.so", noise)
        archive.writestr("some-1.data/purelib/more.py", "x = 1")
        archive.writestr("some-1.data/scripts/tool", "no")
    parts.unpack_wheel(wheel, site)
    assert sorted(str(f.relative_to(site)) for f in site.rglob("*.*")) == [
        "more.py",
        "vllm/core.bin",
    ]
    written = parts.write_parts(site, tmp_path / "kit", 90_000)
    assert [part.name for part in written] == ["part-00", "part-01", "part-02"]
    assert all(part.stat().st_size <= 90_000 for part in written)
    unpack.extract(unpack.checked(tmp_path / "kit"), tmp_path / "out")
    assert (tmp_path / "out" / "vllm" / "core.bin").read_bytes() == noise
    written[1].write_bytes(b"broken")
    with pytest.raises(SystemExit, match="part-01: missing or broken"):
        unpack.checked(tmp_path / "kit")


def test_servers_and_probes_have_one_set_of_sizes(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the second start would not find what the first one compiled."""
    sizes = script("sizes")
    flags = sizes.server_arguments(tiny=False)
    assert len(flags) == len(sizes.engine_arguments(tiny=False))
    assert "--max-num-seqs=1024" in flags
    assert "--enforce-eager" in sizes.server_arguments(tiny=True)
    (compiled,) = [flag.partition("=")[2] for flag in flags if flag.startswith("--compilation")]
    assert json.loads(compiled) == sizes.ON_GPU["compilation_config"]
    monkeypatch.setenv("ENGINE_ARGS", '{"enforce_eager": true}')
    assert sizes.engine_arguments(tiny=False)["enforce_eager"]
    assert sizes.server_arguments(tiny=False) == [*flags, "--enforce-eager"]


@pytest.mark.parametrize(
    ("requirement", "name", "extras"),
    [
        ("sqlalchemy[asyncio]>=2.0.40", "sqlalchemy", {"asyncio"}),
        ("Typing_Extensions (>=4.6)", "typing-extensions", set()),
        ("uvicorn[standard, other] ; python_version > '3'", "uvicorn", {"standard", "other"}),
    ],
)
def test_requirements_are_read(requirement: str, name: str, extras: set[str], script: Any) -> None:
    assert script("pack").split(requirement) == (name, frozenset(extras))


def test_every_dependency_is_pinned_for_the_pack(script: Any) -> None:
    pack = script("pack")
    lines = (pack.ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    pinned = {pack.split(line)[0] for line in lines if pack.PIN.match(line)}
    assert [name for name in pack.wanted(set()) if pack.split(name)[0] not in pinned] == []
