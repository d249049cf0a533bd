"""`conserve plan`: its file, its answer, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from conserve.cli.main import app
from conserve.sim import harvest, planning
from conserve.sim.planning import load_plan, service_rates
from conserve.workload import Window

PLAN = """
profile = "MACHINE"
replicas = 4
hours = 2
[online.arrivals]
kind = "phases"
phases = [{ seconds = 1800, rate_rps = 1.0 }, { seconds = 600, rate_rps = 8.0 }]
[online.lengths]
kind = "independent"
prompt = { kind = "fixed", tokens = 200 }
output = { kind = "fixed", tokens = 20 }
[[jobs]]
name = "nightly"
num_requests = 500
deadline_h = 1.5
[jobs.lengths]
kind = "independent"
prompt = { kind = "fixed", tokens = 500 }
output = { kind = "fixed", tokens = 20 }
"""
PHASES = PLAN[PLAN.index('kind = "phases"') : PLAN.index("[online.lengths]")]
OPENING = 'kind = "opening"\nnum_requests = 3\nspan_s = 5\n'
LENGTHS = PLAN[PLAN.index("[online.lengths]") : PLAN.index("[[jobs]]")]
CONVERSATIONS = """
[[online.sessions]]
opening = { kind = "fixed", tokens = 20 }
message = { kind = "fixed", tokens = 20 }
answer = { kind = "fixed", tokens = 20 }
pause = { median_s = 5, max_s = 9 }
max_turns = 5
max_tokens = 500
"""
MACHINE = """
about = "made up"
[machine]
num_blocks = 400
max_running = 16
max_step_tokens = 512
[cost]
fixed = 0.004
per_token = 4e-5
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # A shorter look at the replica than in earnest: this is about the plan.
    monkeypatch.setattr(harvest, "WINDOW", Window(2.0, 20.0, 10.0))
    (tmp_path / "machine.toml").write_text(MACHINE)
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.replace("MACHINE", str(tmp_path / "machine.toml")))
    return path


def test_a_plan_says_when_each_job_is_done_and_what_is_left(file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    command = ["plan", str(file), "--tbt-ms", "400,20", "--plot", str(picture)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "nightly: 500 requests by 1.5 h: done after 0.0 h, on time" in result.output
    assert "a batch cluster of its own would need" in result.output
    assert result.output.count("every job on time") == 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_plan_without_targets_has_the_machines(file: Path) -> None:
    text = file.read_text()
    told = CliRunner().invoke(app, ["plan", str(file)]).output
    assert "TTFT target 500 ms, from the machine: " in told
    assert "targets 500 ms TTFT, 75 ms TBT: met by " in told
    file.write_text(f"{text}[targets]\nttft_ms = 700\n")
    told = CliRunner().invoke(app, ["plan", str(file)]).output
    assert "from the machine" not in told
    assert "targets 700 ms TTFT, 200 ms TBT: met by " in told


def test_a_job_that_cannot_be_done_is_said_to_be_late(file: Path) -> None:
    file.write_text(file.read_text().replace("500\n", "5000000\n"))
    result = CliRunner().invoke(app, ["plan", str(file)])
    assert "nightly: 5,000,000 requests by 1.5 h: NOT DONE" in result.output


def test_the_curve_has_a_point_for_each_bound(file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    result = CliRunner().invoke(app, ["plan", str(file), "--curve", str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    points = re.findall(r"^  (\S+): chat at .* first come first served$", result.output, re.M)
    assert sorted(points) == ["1.25", "2", "3", "default", "gentle", "greedy"]


def test_a_plan_without_chat_has_no_curve(file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    file.write_text(re.sub(r"rate_rps = [0-9.]+", "rate_rps = 0.0", file.read_text()))
    result = CliRunner().invoke(app, ["plan", str(file), "--curve", str(picture)])
    assert result.exit_code == 2
    assert "--curve: nothing to compare with" in result.output
    assert not picture.exists()


def test_phases_go_round_for_the_whole_time(file: Path) -> None:
    rates = service_rates(load_plan(file), {})
    assert len(rates) == 120
    assert rates.mean() == pytest.approx((30 * 1 + 10 * 8) / 40)
    assert np.array_equal(rates[:40], rates[40:80])


def test_a_request_trace_is_binned_at_the_rate_wanted(file: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(
        f"2023-11-16 18:{second // 60:02}:{second % 60:02}.0000000,100,10\n"
        for second in range(0, 3600, 2)
    )
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    arrivals = """
[online.arrivals]
kind = "replay"
trace = "t"
format = "azure"
rate_rps = 0.25
mean_prompt_tokens = 100
mean_output_tokens = 10
max_prompt_tokens = 1000
max_output_tokens = 100
"""
    text = PLAN.replace("MACHINE", str(tmp_path / "machine.toml"))
    start, end = text.index("[online.arrivals]"), text.index("[[jobs]]")
    file.write_text(text[:start] + arrivals + text[end:])
    plan = load_plan(file)
    assert plan.trace_names() == ["t"]
    # An hour of the trace at half its rate is two.
    with pytest.raises(ValueError, match="holds 2 h at this rate"):
        service_rates(plan, {"t": trace})
    text = file.read_text().replace("deadline_h = 1.5", "deadline_h = 1")
    file.write_text(text.replace("hours = 2", "hours = 1"))
    rates = service_rates(load_plan(file), {"t": trace})
    assert rates == pytest.approx(np.full(60, 0.25))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("replicas = 4", "replicas = 0", "replicas"),
        ("replicas", "replica", "did you mean 'replicas'"),
        ("deadline_h = 1.5", "deadline_h = 0.5\nsubmit_h = 1", "is not after submit_h"),
        ("hours = 2", "hours = 2\nslot_s = 1", "slot_s"),
        ("hours = 2", "hours = 2\nslot_s = 9000", "slot_s 9000 is longer than the plan's 2 h"),
        ("hours = 2", "hours = 1e12", "hours: Input should be less than or equal to 8784"),
        ("deadline_h = 1.5", "deadline_h = 3", "deadline_h 3 of 'nightly' is after the plan's 2 h"),
        ("machine.toml", "nothing.toml", "nothing.toml"),
        ('"phases"', '"waves"', "online.arrivals"),
        (PHASES, OPENING, "kind 'opening' has no rate"),
        (LENGTHS, CONVERSATIONS, "online.sessions: a plan has no conversations"),
    ],
)
def test_bad_plans_name_the_field(file: Path, old: str, new: str, message: str) -> None:
    file.write_text(file.read_text().replace(old, new, 1))
    result = CliRunner().invoke(app, ["plan", str(file)])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trace", "x=y"], "unknown trace 'x'"),
        (["--tbt-ms", "fast"], "is no list of numbers"),
        (["--tbt-ms", "100,0"], "--tbt-ms: 0 is no number of milliseconds above 0"),
        (["--ttft-ms", "nan"], "--ttft-ms: nan is no number of milliseconds above 0"),
        (["--ttft-ms", "inf"], "--ttft-ms: inf is no number of milliseconds above 0"),
        (["--plot", "/dev/null/x.png"], "/dev/null/x.png: Not a directory"),
        (["--plot", "no/such/x.png"], "no/such/x.png: No such file or directory"),
        (["--plot", "plan.txt"], "--plot: plan.txt is no picture"),
        (["--curve", "curve.pgn"], "--curve: curve.pgn is no picture"),
    ],
)
def test_bad_options_are_one_clear_line(
    file: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is simulated, which takes minutes on a larger machine."""
    monkeypatch.setattr(planning, "work_out", None)
    result = CliRunner().invoke(app, ["plan", str(file), *words])
    assert result.exit_code == 2
    assert message in result.output
