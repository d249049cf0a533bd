"""Offline work lasts as long as a simulated run does, whatever the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conserve.bench.store import ResultFolder
from conserve.cli.main import app
from conserve.sim import harvest
from conserve.sim.arms import ARMS
from conserve.sim.profiles import Profile
from conserve.sim.study import Study
from conserve.sim.supply import ran_out
from conserve.workload import Window
from conserve.workload.scenario import Scenario
from tests.sim.sim_world import COST, MACHINE, TARGETS

PROFILE = Profile("test", "made up", MACHINE, COST)
LENGTHS = {
    "kind": "independent",
    "prompt": {"kind": "fixed", "tokens": 200},
    "output": {"kind": "fixed", "tokens": 4},
}
OFFLINE = """
about = "offline work alone"
duration_s = 10
lead_in_s = 1
seeds = [1, 2]
arms = ["offline-only", "fcfs"]
[offline]
in_flight = 8
num_requests = 30
[offline.lengths]
kind = "independent"
prompt = { kind = "fixed", tokens = 200 }
output = { kind = "fixed", tokens = 4 }
"""


def scenario(num_requests: int, in_flight: int | str = 8) -> Scenario:
    offline = {"in_flight": in_flight, "num_requests": num_requests, "lengths": LENGTHS}
    return Scenario.of({"name": "x", "about": "x", "duration_s": 10, "offline": offline}, "x")


def test_a_harvest_does_not_depend_on_how_many_requests_are_drawn_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harvest, "WINDOW", Window(2.0, 20.0, 0.0))
    found = []
    for num_requests in (50, 20_000):
        monkeypatch.setattr(harvest, "NUM_REQUESTS", num_requests)
        load = harvest.Load(LENGTHS, LENGTHS, rate_rps=1.0)
        summary, size = harvest.at_rate(PROFILE, ARMS["conserve"], TARGETS, load, {}, seed=1)
        found.append(summary)
        assert size == 204
    assert found[0] == found[1]
    assert found[0].offline_rps * 22 > 50


def test_every_arm_of_a_study_has_offline_work_to_the_end() -> None:
    few = scenario(30).model_copy(update={"arms": ("online-only", "fcfs", "conserve")})
    cells = list(Study(few, PROFILE, {}).cells())
    many = few.offline
    assert many is not None
    ample = few.model_copy(update={"offline": many.model_copy(update={"num_requests": 5000})})
    expected = list(Study(ample, PROFILE, {}).cells())
    assert [cell.summary for cell in cells] == [cell.summary for cell in expected]
    assert len({cell.num_offline for cell in cells}) == 1
    assert all(sum(not r.online for r in c.records) < c.num_offline for c in cells)


def test_what_is_all_sent_at_once_cannot_run_out() -> None:
    everything = scenario(30, in_flight="all").model_copy(update={"arms": ("fcfs",), "seeds": (1,)})
    (cell,) = Study(everything, PROFILE, {}).cells()
    assert cell.num_offline == len(cell.records) == 30
    assert not ran_out(everything, cell.records)
    assert ran_out(scenario(30), cell.records)


def test_the_command_says_how_many_it_took_and_stores_that(tmp_path: Path) -> None:
    file, out, machine = tmp_path / "few.toml", tmp_path / "out", tmp_path / "m.toml"
    file.write_text(OFFLINE)
    machine.write_text(
        'about = "x"\n[machine]\nnum_blocks = 400\n[cost]\nfixed = 0.004\nper_token = 4e-5\n'
    )
    command = ["sim", "run", str(file), "--profile", str(machine), "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert " offline requests, since the scenario's 30 ran out" in result.output
    offline = ResultFolder(out).description().parsed_scenario().offline
    assert offline is not None
    assert offline.num_requests > 30
    file.write_text(OFFLINE.replace("num_requests = 30", "num_requests = 5000"))
    result = CliRunner().invoke(app, command)
    assert "ran out" not in result.output
    # The report of such a folder has nothing to warn of.
    result = CliRunner().invoke(app, ["bench", "report", str(out)])
    assert result.exit_code == 0, result.output
    assert "ran out" not in (out / "report.md").read_text()


def test_a_faster_machine_harvests_more() -> None:
    """Of a scenario that was made for a slower one."""
    few = scenario(30).model_copy(update={"arms": ("fcfs",), "seeds": (1,)})
    fast = replace(PROFILE, cost=replace(COST, fixed=COST.fixed / 4, per_token=COST.per_token / 4))
    rates = [next(iter(Study(few, p, {}).cells())).summary.offline_rps for p in (PROFILE, fast)]
    assert rates[1] > 2 * rates[0] > 0
