"""The command line, up to the point where a server would start."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conserve.batch.settings import BatchSettings
from conserve.bench import machine
from conserve.bench.arms import ARMS, arm_named
from conserve.bench.commands import server_command
from conserve.bench.prompts import Vocabulary
from conserve.bench.selection import SCENARIOS, chosen, trace_paths
from conserve.cli.main import app
from conserve.core.snapshot import Targets
from conserve.workload import RequestPlan, ScenarioError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "burts"], "unknown scenario 'burts': did you mean 'burst'?"),
        (["run", "nowhere.toml"], "nowhere.toml: "),
        (["run", "quick", "--arms", "fcsf"], "unknown arm 'fcsf': did you mean 'fcfs'?"),
        (["run", "quick", "--arms", ","], "--arms: names nothing"),
        (["run", "quick", "--seeds", "1,b"], "--seeds: '1,b' is no list of integers"),
        (["run", "quick", "--scale", "0"], "--scale: '0' is neither auto nor a number above 0"),
        (["run", "quick", "--scale", "fast"], "--scale: 'fast' is neither"),
        (["run", "azure-conv"], "give the trace with --trace azure-conv=PATH"),
        (["run", "azure-conv", "--trace", "nowhere.csv"], "no file nowhere.csv"),
        (["run", "azure-conv", "--trace", "conv=x"], "did you mean 'azure-conv'?"),
        (["report", "nowhere"], "run.json: cannot be read"),
        (["compare", "nowhere", "elsewhere"], "run.json: cannot be read"),
        (["publish", "nowhere"], "run.json: cannot be read"),
    ],
)
def test_bad_input_is_one_message_and_status_2(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    extra = ["--model", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["bench", *arguments, *(extra * (arguments[0] == "run"))])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("conserve bench: ")
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_bad_trace_is_found_before_a_server_starts(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nx,1,1\ny,1,1\n")
    out = tmp_path / "out"
    arguments = ["run", "azure-conv", "--model", str(tmp_path), "--out", str(out)]
    result = CliRunner().invoke(app, ["bench", *arguments, "--trace", str(trace)])
    assert result.exit_code == 2
    assert "2 bad rows, the first on line 2" in result.stderr
    assert not out.exists()


def test_arms_and_seeds_can_be_chosen() -> None:
    scenario = chosen(SCENARIOS / "quick.toml", "conserve, fcfs", "3,4")
    assert scenario.arms == ("conserve", "fcfs")
    assert scenario.seeds == (3, 4)


def test_a_seed_named_twice_is_one_run() -> None:
    scenario = chosen(SCENARIOS / "quick.toml", "conserve,conserve", "3,03,4")
    assert scenario.arms == ("conserve",)
    assert scenario.seeds == (3, 4)


def test_an_arm_that_would_be_sent_nothing_is_refused(tmp_path: Path) -> None:
    text = (SCENARIOS / "acceptance.toml").read_text()
    file = tmp_path / "no-offline.toml"
    file.write_text(text.partition("[offline]")[0])
    with pytest.raises(ScenarioError, match="arm 'offline-only' would be sent nothing"):
        chosen(file, "offline-only", None)


def test_two_traces_need_their_names(tmp_path: Path) -> None:
    lengths = (SCENARIOS / "summarise.toml").read_text().partition("[offline]")[2]
    online = (SCENARIOS / "azure-conv.toml").read_text().partition("[offline]")[0]
    (tmp_path / "both.toml").write_text(f"{online}[offline]{lengths}")
    scenario = chosen(tmp_path / "both.toml", None, None)
    file = tmp_path / "a.csv"
    file.write_text("")
    with pytest.raises(ScenarioError, match="say which with NAME=PATH"):
        trace_paths(scenario.trace_names(), [str(file)])
    paths = trace_paths(scenario.trace_names(), [f"azure-conv={file}", f"arxiv={file}"])
    assert paths == {"azure-conv": file, "arxiv": file}


DATA = Path("fresh-folder")


def test_every_arm_gets_the_same_arguments_and_its_own() -> None:
    common = ["--dtype=bfloat16", "--max-num-seqs=64"]
    for arm in ARMS.values():
        command = server_command(arm, "model", 1234, common, Targets(0.5, 0.1), DATA)
        assert set(common) <= set(command)
        assert ("--slo-ttft-ms" in command) == (arm.kind == "conserve")
        assert ("--no-batches" in command) == (arm.kind == "conserve" and not arm.batch)
        assert (str(DATA) in command) == arm.batch
        for argument in arm.args:
            assert argument in command
        assert arm.shows.endswith(".")


def test_settings_of_an_ablation_are_settings_of_the_engine() -> None:
    settings = pytest.importorskip("conserve.engine.settings")
    default = settings.EngineSettings()
    for arm in ARMS.values():
        command = server_command(arm, "model", 1, [], Targets(), DATA)
        if not arm.settings:
            assert "--additional-config" not in command
            continue
        given = json.loads(command[command.index("--additional-config") + 1])["conserve"]
        assert settings.EngineSettings.from_json_dict(given) != default


def test_settings_of_a_batch_arm_are_settings_of_the_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for arm in ARMS.values():
        for name, value in arm.environment.items():
            monkeypatch.setenv(name, value)
        assert bool(BatchSettings().model_fields_set) == bool(arm.environment)
        for name in arm.environment:
            monkeypatch.delenv(name)


def test_arms_are_found_by_name() -> None:
    assert arm_named("fcfs").name == "fcfs"
    with pytest.raises(ScenarioError, match="unknown arm 'conserv': did you mean 'conserve'"):
        arm_named("conserv")


def plan(request_id: str, num_tokens: int, *prefix: tuple[str, int]) -> RequestPlan:
    return RequestPlan(request_id, True, 0.0, num_tokens, 1, prefix)


@pytest.fixture
def vocabulary() -> Vocabulary:
    words = [f"Ġ{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    others = ["<|end|>", "Ġ", "ing", "Ġ12", "ĠNot", "Ċ"]
    return Vocabulary.of_tokens({word: i for i, word in enumerate(others + words)})


def test_prompts_have_exactly_their_tokens_of_plain_words(vocabulary: Vocabulary) -> None:
    ids = vocabulary.prompt(plan("a", 500), "t")
    assert len(ids) == 500
    assert min(ids) >= 6
    assert len(set(ids)) > 50


def test_prompts_differ_but_for_what_they_share(vocabulary: Vocabulary) -> None:
    a, b = (vocabulary.prompt(plan(name, 60, ("shared", 20)), "t") for name in "ab")
    assert a[:20] == b[:20]
    assert a[20:] != b[20:]
    assert a == vocabulary.prompt(plan("a", 60, ("shared", 20)), "t")
    assert a[:20] != vocabulary.prompt(plan("a", 60, ("shared", 20)), "another text")[:20]
    assert len(vocabulary.prompt(plan("c", 30, ("x", 20), ("y", 20)), "t")) == 30


def test_a_model_without_plain_words_or_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="no plain words"):
        Vocabulary.of_tokens({"7": 0, "<s>": 1})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ScenarioError, match=r"no tokenizer\.json could be read"):
        Vocabulary.of_model(str(tmp_path))


def test_what_the_user_set_in_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("LD_PRELOAD", "")
    chosen_environment = machine.server_environment("model")
    assert chosen_environment.get("VLLM_CPU_OMP_THREADS_BIND", "nobind") == "nobind"
    assert chosen_environment.get("LD_PRELOAD", "") == ""


def test_the_last_server_argument_wins() -> None:
    args = machine.server_args(("--dtype=float32",), ("--dtype=auto",), "bfloat16")
    assert [a for a in args if a.startswith("--dtype")][-2:] == ["--dtype=float32", "--dtype=auto"]


def test_the_machine_is_described_and_its_speed_is_a_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    described = machine.describe_machine()
    assert described["cores"] == str(len(os.sched_getaffinity(0)))
    assert re.fullmatch(r"\d+", described["memory_gib"])
    monkeypatch.setattr(machine, "PROBE_S", 0.01)
    assert machine.probe_gflops() > 0


def test_a_cpu_serves_in_what_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_accelerator", lambda: None)
    for name, kv_gib in (("bfloat16", 1), ("float32", 2)):
        args = machine.server_args((), (), name)
        assert f"--dtype={name}" in args
        assert f"--kv-cache-memory-bytes={kv_gib * 2**30}" in args
    monkeypatch.setattr(machine, "_accelerator", lambda: "a GPU")
    assert machine.server_args((), (), "float32") == []
