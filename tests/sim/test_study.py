"""Scenario files run here as in the benchmark; real records are compared with simulated ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conserve.bench.arms import ARMS as BENCH_ARMS
from conserve.bench.store import ResultFolder
from conserve.cli.main import app
from conserve.metrics import median, read_records
from conserve.metrics.first_tokens import Part
from conserve.sim.arms import ARMS, arm_named
from conserve.sim.first_token_table import HEADINGS, first_token_table
from conserve.sim.profiles import Profile
from conserve.sim.ratios import ratio_rows
from conserve.sim.study import Study, table
from conserve.sim.validation import COMPARED, SHARES, RealRun, compare, markdown
from conserve.workload import Scenario, ScenarioError, load_scenario
from tests.sim.sim_world import COST, MACHINE

SCENARIO = """
about = "a test"
duration_s = 5
lead_in_s = 1
seeds = [1, 2]
arms = ["online-only", "conserve"]
[online.arrivals]
kind = "gamma"
rate_rps = 4.0
[online.lengths]
kind = "independent"
prompt = { kind = "fixed", tokens = 100 }
output = { kind = "fixed", tokens = 10 }
[offline]
in_flight = 8
[offline.lengths]
kind = "independent"
prompt = { kind = "fixed", tokens = 400 }
output = { kind = "fixed", tokens = 20 }
"""
PROFILE = Profile("test", "made up", MACHINE, COST)


REPLAY = """
about = "BurstGPT's columns."
duration_s = 5
seeds = [1, 2]
arms = ["online-only"]

[online.arrivals]
kind = "replay"
trace = "t"
format = "burstgpt"
rate_rps = 2
mean_prompt_tokens = 20
mean_output_tokens = 5
max_prompt_tokens = 100
max_output_tokens = 10
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(SCENARIO)
    return path


@pytest.fixture
def scenario(file: Path) -> Scenario:
    return load_scenario(file)


NOT_SIMULATED = {
    "conserve-swap",
    "conserve-batch",
    "conserve-batch-file-order",
    "conserve-no-online-copies",
}
"""Another connector, the batch service, and copies of conversations, which are not simulated."""


def test_every_arm_of_the_benchmark_exists_here() -> None:
    assert set(BENCH_ARMS) - set(ARMS) == NOT_SIMULATED
    for name in BENCH_ARMS.keys() & ARMS.keys():
        arm = BENCH_ARMS[name]
        assert (arm.online, arm.offline) == (ARMS[name].online, ARMS[name].offline)
        assert (arm.kind == "stock") == ARMS[name].stock


def test_an_unknown_arm_is_refused_with_the_nearest() -> None:
    with pytest.raises(ScenarioError, match="unknown arm 'conserv': did you mean 'conserve'"):
        arm_named("conserv")


def test_a_study_has_a_cell_for_every_point_arm_and_seed(scenario: Scenario) -> None:
    cells = list(Study(scenario, PROFILE, {}).cells())
    assert [(c.arm, c.seed) for c in cells] == [
        ("online-only", 1), ("conserve", 1), ("online-only", 2), ("conserve", 2),
    ]  # fmt: skip
    rows = table(cells)
    assert [row[:2] for row in rows[1:]] == [["all", "online-only"], ["all", "conserve"]]
    assert rows[1][-2] == "0"
    assert float(rows[2][-2]) > 100


def test_first_tokens_are_taken_apart(scenario: Scenario) -> None:
    """Their parts are all of the time in the engine, alone and beside offline work."""
    cells = list(Study(scenario, PROFILE, {}).cells())
    for cell in cells:
        online = [r for r in cell.records if r.online and r.token_times_s]
        ttft_s = sum(r.token_times_s[0] - r.arrival_s for r in online)
        assert len(cell.first_token_parts) == len(online)
        assert sum(sum(p.values()) for p in cell.first_token_parts) == pytest.approx(ttft_s)
    header, *rows = first_token_table(cells)
    for arm in ("online-only", "conserve"):
        lines = {row[2]: row[3:] for row in rows if row[:2] == ["all", arm]}
        chosen = [cell for cell in cells if cell.arm == arm]
        sums = [sum(parts.values()) for cell in chosen for parts in cell.first_token_parts]
        mean_s = sum(sums) / len(sums)
        assert sum(float(line[3]) for line in lines.values()) == pytest.approx(
            1e3 * mean_s, rel=0.1
        )
        assert lines[Part.PREFILL.in_words][0] == "100.0"
        offline = {Part.STOP, Part.OFFLINE, Part.STOPPABLE_STEP, Part.UNSTOPPABLE_STEP}
        assert any(part.in_words in lines for part in offline) == (arm == "conserve")
    assert header[3:] == list(HEADINGS[3:])


def _real(scenario: Scenario, profile: Profile) -> list[RealRun]:
    cells = Study(scenario, profile, {}).cells()
    return [RealRun(cell.point, cell.arm, cell.seed, cell.records) for cell in cells]


def test_the_simulator_agrees_with_itself(scenario: Scenario) -> None:
    for comparison in compare(scenario, _real(scenario, PROFILE), PROFILE, {}):
        assert comparison.error == 0, comparison


def test_a_wrong_profile_shows_as_an_error(scenario: Scenario) -> None:
    slow = replace(PROFILE, cost=replace(COST, fixed=COST.fixed * 2))
    comparisons = compare(scenario, _real(scenario, PROFILE), slow, {})
    alone = {c.figure: c.error for c in comparisons if c.arm == "online-only"}
    told = set(COMPARED) - set(SHARES)
    assert set(alone) == {name for name in told if "offline" not in name}
    # fixed is 4 ms of about 6.6 ms.
    assert alone["tbt_p50_s"] == pytest.approx(4 / 6.6, abs=0.1)
    assert "+6" in markdown(comparisons)


CONVERSATIONS = """
about = "a test"
duration_s = 5
lead_in_s = 2
seeds = [1]
arms = ["online-only", "fcfs", "conserve-forgetful", "conserve"]
[online]
in_lead_in = true
[online.arrivals]
kind = "opening"
num_requests = 3
span_s = 1
[[online.sessions]]
opening = { kind = "fixed", tokens = 200 }
message = { kind = "fixed", tokens = 20 }
answer = { kind = "fixed", tokens = 4 }
pause = { median_s = 0.6, max_s = 2 }
max_turns = 20
max_tokens = 700
[offline]
in_flight = 8
[offline.lengths]
kind = "independent"
prompt = { kind = "fixed", tokens = 400 }
output = { kind = "fixed", tokens = 20 }
"""


@pytest.fixture
def conversations(tmp_path: Path) -> Scenario:
    path = tmp_path / "conversations.toml"
    path.write_text(CONVERSATIONS)
    return load_scenario(path)


SMALL = replace(PROFILE, machine=replace(MACHINE, num_blocks=320))
"""Memory for the conversations and all documents that run at a time, and not for much more."""


def test_a_sweep_evicts_conversations_unless_they_are_kept(conversations: Scenario) -> None:
    cells = list(Study(conversations, SMALL, {}).cells())
    found = {cell.arm: cell.summary.online_hit_ratio or 0.0 for cell in cells}
    assert max(found["fcfs"], found["conserve-forgetful"]) < found["online-only"] / 2
    assert found["conserve"] > 0.95 * found["online-only"] > 0.5
    heading, *rows = table(cells)
    shown = dict(zip((row[1] for row in rows), (row[heading.index("chat found %")] for row in rows),
                     strict=True))  # fmt: skip
    assert shown["conserve"] == f"{100 * found['conserve']:.1f}"


def test_turns_follow_answers_until_the_window_ends(conversations: Scenario) -> None:
    (cell, *_) = Study(conversations, SMALL, {}).cells()
    turns = [record for record in cell.records if record.request_id.startswith("online-0")]
    assert len(turns) > 3
    for before, after in pairwise(turns):
        assert after.arrival_s >= before.token_times_s[-1] + 0.5
    assert all(record.arrival_s < 5 and record.finished for record in turns)


def test_shares_that_are_foretold_are_off_by_points(conversations: Scenario) -> None:
    real = _real(conversations, SMALL)
    assert all(c.error == 0 for c in compare(conversations, real, SMALL, {}))
    ample = replace(SMALL, machine=replace(MACHINE, num_blocks=2000))
    comparisons = compare(conversations, real, ample, {})
    fcfs = next(c for c in comparisons if (c.arm, c.figure) == ("fcfs", "online_hit_ratio"))
    assert fcfs.error == pytest.approx(fcfs.simulated - fcfs.real)
    text = markdown(comparisons)
    assert f", {100 * fcfs.error:+.1f}" in text
    assert "shares of tokens found are within 5 points" in text


def test_arms_that_are_not_simulated_are_left_out(scenario: Scenario) -> None:
    real = _real(scenario, PROFILE)
    strange = [RealRun("all", "vllm-next", 1, real[0].records)]
    assert compare(scenario, real + strange, PROFILE, {}) == compare(scenario, real, PROFILE, {})
    with pytest.raises(ValueError, match="no stored run is of an arm that is simulated"):
        compare(scenario, strange, PROFILE, {})


def test_the_commands_run_store_and_validate(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["sim", "run", str(file), "--out", str(out), "--chrome-trace", "--seeds", "1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "conserve" in result.output
    records = read_records(out / "records" / "all" / "conserve.seed-1.jsonl.gz")
    assert any(not record.online for record in records)
    assert (out / "all.conserve.seed-1.trace.json").stat().st_size > 1000
    command = ["sim", "validate", str(out), "--profile", "h100/llama-3.1-8b"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "table.md")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "table.md").read_text() == result.stdout
    assert "TTFT p99 ms" in result.output
    assert "| all | conserve | " in result.output
    assert "10 of 10 figures are within 15%" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nothing.toml"], "nothing.toml"),
        (["run", "FILE", "--arms", "conserv"], "did you mean 'conserve'"),
        (["run", "FILE", "--seeds", "one"], "is no list of integers"),
        (["run", "FILE", "--profile", "h100"], "give GPU/MODEL"),
        (["run", "FILE", "--chrome-trace"], "give the folder with --out"),
        (["run", "FILE", "--out", "/dev/null/x"], "/dev/null/x: Not a directory"),
        (["validate", ".", "--seeds", "x", "--profile", "h100/llama-3.1-8b"], "conserve bench run"),
        (["validate", ".", "--profile", "h100/llama-3.1-8b"], "conserve bench run"),
    ],
)
def test_bad_input_is_one_clear_line(file: Path, words: list[str], message: str) -> None:
    words = [str(file) if word == "FILE" else word for word in words]
    result = CliRunner().invoke(app, ["sim", *words])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_simulation_overwrites_no_measured_run(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["sim", "run", str(file), "--seeds", "1", "--out", str(out)]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner().invoke(app, command).exit_code == 0  # its own it may
    folder = ResultFolder(out)
    folder.write_description(replace(folder.description(), machine={"cpu": "of somebody"}))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert f"--out: {out} holds runs that were measured" in result.output.replace("\n", "")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_failed_requests_of_a_trace_are_told(tmp_path: Path) -> None:
    trace, file = tmp_path / "b.csv", tmp_path / "replay.toml"
    rows = "".join(f"{i},20,{i % 3}\n" for i in range(60))
    trace.write_text(f"Timestamp,Request tokens,Response tokens\n{rows}")
    file.write_text(REPLAY)
    result = CliRunner().invoke(app, ["sim", "run", str(file), "--trace", str(trace)])
    assert result.exit_code == 0, result.output
    (told,) = (row for row in result.output.splitlines() if row.startswith("trace "))
    assert told.startswith("trace t: time x ")
    assert told.endswith(", 20 failed requests left out")


def test_a_scenario_without_targets_has_the_machines(file: Path, tmp_path: Path) -> None:
    named = tmp_path / "named.toml"
    named.write_text(f"{SCENARIO}[targets]\ntbt_ms = 90\n")
    for path, said in ((file, True), (named, False)):
        out = tmp_path / path.stem
        result = CliRunner().invoke(
            app, ["sim", "run", str(path), "--seeds", "1", "--out", str(out)]
        )
        assert result.exit_code == 0, result.output
        assert ("TBT target 75 ms, from the machine: " in result.output) is said
        targets = ResultFolder(out).description().parsed_scenario().targets
        assert (targets.ttft_ms, targets.tbt_ms) == ((500, 75) if said else (1000, 90))


def test_what_can_be_simulated_is_listed() -> None:
    result = CliRunner().invoke(app, ["sim", "list"])
    assert "llama-3.1-70b" in result.output
    assert "sarathi-p" in result.output


def test_arms_are_told_beside_chat_alone_and_the_bound(scenario: Scenario) -> None:
    arms = ("online-only", "fcfs", "conserve", "conserve-no-stop")
    cells = list(Study(scenario.model_copy(update={"arms": arms}), PROFILE, {}).cells())
    header, *rows = ratio_rows(cells)
    assert header[:4] == ["point", "arm", "TTFT p50, of online-only", "TBT p50, of online-only"]
    told = {row[1]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(told) == ["fcfs", "conserve", "conserve-no-stop"]
    assert told["fcfs"]["offline tok/s, of fcfs"] == "-"
    assert told["fcfs"]["says: offline"] == "-"
    own = [cell for cell in cells if cell.arm == "conserve"]
    alone = {cell.seed: cell for cell in cells if cell.arm == "online-only"}
    ratios = [
        (cell.summary.tbt_p50_s or 0) / (alone[cell.seed].summary.tbt_p50_s or 1) for cell in own
    ]
    assert told["conserve"]["TBT p50, of online-only"] == f"{median(ratios):.2f}"
    assert float(told["conserve"]["says: TBT mean"]) >= 1
    assert float(told["conserve"]["says: offline"]) > 0
    assert len(ratio_rows([cell for cell in cells if cell.arm == "conserve"])) == 1
