"""The runner with fake servers: real processes, real sockets, no model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from conserve.bench import load, machine, runner
from conserve.bench import plan as bench_plan
from conserve.bench.arms import Arm
from conserve.bench.load import Job
from conserve.bench.plan import Plan, fit_to_machine
from conserve.bench.ports import free_port
from conserve.bench.report.figures import figures_of
from conserve.bench.runner import Runner
from conserve.bench.server import Server, ServerDiedError
from conserve.bench.store import ResultError, ResultFolder, RunKey
from conserve.workload import Scenario

FAKE = str(Path(__file__).with_name("token_server.py"))
TABLE = {
    "name": "fake",
    "about": "A test.",
    "duration_s": 0.6,
    "lead_in_s": 0.1,
    "drain_s": 5,
    "seeds": [1, 2],
    "arms": ["online-only", "fcfs"],
    "online": {
        "arrivals": {"kind": "bursts", "num_requests": 3, "burst_size": 3, "burst_span_s": 0},
        "lengths": {
            "kind": "independent",
            "prompt": {"kind": "fixed", "tokens": 8},
            "output": {"kind": "fixed", "tokens": 3},
        },
    },
    "offline": {
        "in_flight": 2,
        "num_requests": 5000,
        "lengths": {
            "kind": "independent",
            "prompt": {"kind": "fixed", "tokens": 20},
            "output": {"kind": "fixed", "tokens": 3},
        },
    },
}


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Arms in it get a server that ends itself after so many answers."""
    after: dict[str, str] = {}

    def command(
        arm: Arm, model: str, port: int, args: Any, targets: Any, data_dir: Path
    ) -> list[str]:
        limit = [after[arm.name]] if arm.name in after else []
        limit += ["--data-dir", str(data_dir)] if arm.batch else []
        return [sys.executable, FAKE, str(port), *limit]

    for module in (runner, bench_plan):
        monkeypatch.setattr(module, "server_command", command)
    monkeypatch.setattr(machine, "PROBE_S", 0.0)
    monkeypatch.setattr(machine, "server_environment", lambda model: {})
    return after


def plan(model: Path, folder: Path, **changes: Any) -> Plan:
    scenario: Scenario = Scenario.of({**TABLE, **changes}, "fake")
    return Plan(scenario, str(model), folder, command="conserve bench run fake")


def run(wanted: Plan) -> tuple[dict[RunKey, str], list[str]]:
    said: list[str] = []
    return Runner(wanted, said.append).run(), said


def order_of_starts(said: list[str]) -> list[str]:
    return [line.removesuffix(": starting its server") for line in said if "starting" in line]


@pytest.mark.usefixtures("dying")
def test_arms_are_interleaved_and_every_run_is_stored(model: Path, tmp_path: Path) -> None:
    failures, said = run(plan(model, tmp_path / "out"))
    assert failures == {}
    assert order_of_starts(said) == [
        "online-only, seed 1",
        "fcfs, seed 1",
        "fcfs, seed 2",
        "online-only, seed 2",
    ]
    folder = ResultFolder(tmp_path / "out")
    runs = list(folder.runs())
    assert len(runs) == 4
    for stored in runs:
        online = [r for r in stored.records if r.online]
        offline = [r for r in stored.records if not r.online]
        assert len(online) == 3
        assert all(r.finished and r.num_prompt_tokens == 8 for r in online)
        assert bool(offline) == (stored.key.arm == "fcfs")
        assert not any(r.failed for r in stored.records)
        assert "conserve:stopped_steps_total" in stored.counters_end
    assert str(tmp_path) not in (tmp_path / "out" / "run.json").read_text()


@pytest.mark.usefixtures("dying")
def test_arms_that_start_alike_may_take_turns_on_one_server(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are sent different texts: the second would find the first one's in the prefix cache."""
    texts: list[str] = []
    start = load.start

    def noted(job: Job, log: Path) -> Any:
        texts.append(job.text)
        return start(job, log)

    monkeypatch.setattr(load, "start", noted)
    wanted = plan(
        model, tmp_path / "out", arms=["online-only", "fcfs", "conserve-batch"], seeds=[1]
    )
    _, said = run(replace(wanted, share_servers=True))
    assert [line for line in said if "starting" in line] == [
        "online-only and fcfs, seed 1: starting their server",
        "conserve-batch, seed 1: starting its server",
    ]
    stored = {run.key.arm for run in ResultFolder(tmp_path / "out").runs()}
    assert stored == {"online-only", "fcfs", "conserve-batch"}
    assert len(set(texts)) == len(texts) == 3


@pytest.mark.usefixtures("dying")
def test_arms_that_are_compared_are_run_beside_one_another(model: Path, tmp_path: Path) -> None:
    """Point after point: what is cut off leaves whole comparisons."""
    points = [
        {"name": name, "x": x, "set": {"online.arrivals.num_requests": x}}
        for name, x in (("busy", 6), ("calm", 3))
    ]
    wanted = plan(model, tmp_path / "out", seeds=[1], points=points)
    runner = Runner(replace(wanted, share_servers=True), lambda text: None)
    left = runner._left(runner._arms, 1)
    assert [(key.point, key.arm) for _, key, _ in left] == [
        ("busy", "online-only"), ("busy", "fcfs"), ("calm", "online-only"), ("calm", "fcfs"),
    ]  # fmt: skip


@pytest.mark.usefixtures("dying")
def test_offline_work_may_go_as_a_batch(model: Path, tmp_path: Path) -> None:
    wanted = plan(model, tmp_path / "out", arms=["conserve-batch"], seeds=[1], duration_s=3)
    failures, said = run(wanted)
    assert failures == {}
    assert "offline " in said[-1]
    (stored,) = ResultFolder(tmp_path / "out").runs()
    assert [record.online for record in stored.records] == [True] * 3
    assert all(record.finished for record in stored.records)
    done = stored.counted("batch:done_lines_total")
    assert done
    assert stored.counted("batch:failed_lines_total") == 0
    assert stored.counters_end["batch:lines_left"] > 0
    figures = figures_of(ResultFolder(tmp_path / "out")).points["all"]["conserve-batch"]
    assert figures["offline_rps"].median == pytest.approx(done / 3, rel=1e-4)
    assert figures["offline_prompt_tps"].median == pytest.approx(20 * done / 3, rel=0.2)
    described = ResultFolder(tmp_path / "out").description().arms["conserve-batch"]["command"]
    assert described.startswith("CONSERVE_BATCH_MAX_IN_FLIGHT=2 python")
    assert str(tmp_path) not in described


@pytest.mark.usefixtures("dying")
def test_a_folder_is_gone_on_with_and_not_repeated(model: Path, tmp_path: Path) -> None:
    run(plan(model, tmp_path / "out", seeds=[1], arms=["fcfs"]))
    before = (tmp_path / "out/records/all/fcfs.seed-1.jsonl.gz").read_bytes()
    _, said = run(plan(model, tmp_path / "out", seeds=[1], arms=["online-only", "fcfs"]))
    assert order_of_starts(said) == ["online-only, seed 1"]
    assert (tmp_path / "out/records/all/fcfs.seed-1.jsonl.gz").read_bytes() == before
    arms = {stored.key.arm for stored in ResultFolder(tmp_path / "out").runs()}
    assert arms == {"fcfs", "online-only"}


@pytest.mark.usefixtures("dying")
def test_another_scenario_s_folder_is_refused(model: Path, tmp_path: Path) -> None:
    run(plan(model, tmp_path / "out", seeds=[1], arms=["online-only"]))
    with pytest.raises(ResultError, match="another scenario"):
        run(plan(model, tmp_path / "out", duration_s=0.7))


def test_a_server_that_dies_fails_its_arm_alone(
    model: Path, tmp_path: Path, dying: dict[str, str]
) -> None:
    dying["fcfs"] = "20"  # the 8 requests of the warm-up are answered
    wanted = plan(model, tmp_path / "out", seeds=[1], arms=["fcfs", "online-only"], duration_s=3)
    failures, _ = run(wanted)
    (why,) = failures.values()
    assert next(iter(failures)).arm == "fcfs"
    assert "the server ended with status 3" in why
    assert "the fake server begins" in why
    folder = ResultFolder(tmp_path / "out")
    assert folder.failures() == failures
    assert [stored.key.arm for stored in folder.runs()] == ["online-only"]


def test_a_server_that_never_starts_shows_its_log(tmp_path: Path) -> None:
    script = "import sys; sys.exit('no such model: nowhere')"
    with (
        Server([sys.executable, "-c", script], {}, free_port(), tmp_path / "log") as server,
        pytest.raises(ServerDiedError, match="status 1\nno such model: nowhere"),
    ):
        server.wait_until_healthy(60)


def test_a_server_s_children_end_with_it(tmp_path: Path) -> None:
    script = (
        "import signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time\\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    with Server([sys.executable, "-c", script], {}, free_port(), log):
        while not log.read_text().strip():
            time.sleep(0.01)
        child = int(log.read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.is_file() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_ctrl_c_ends_the_server_and_keeps_what_was_measured(
    model: Path, tmp_path: Path, dying: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(plan(model, tmp_path / "out", seeds=[1], arms=["online-only"]))
    servers: list[Server] = []

    def interrupt(client: subprocess.Popen[bytes], server: Server) -> int:
        servers.append(server)
        try:
            raise KeyboardInterrupt
        finally:
            client.send_signal(signal.SIGKILL)
            client.wait()

    monkeypatch.setattr(runner, "_drive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(plan(model, tmp_path / "out", seeds=[1], arms=["online-only", "fcfs"]))
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{servers[0].base_url}/health")
    assert [stored.key.arm for stored in ResultFolder(tmp_path / "out").runs()] == ["online-only"]


@pytest.mark.usefixtures("dying")
def test_the_scale_is_measured_once_and_kept_with_the_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(bench_plan, "scale_of", lambda speed: 2.0)
    wanted = plan(model, tmp_path / "out", seeds=[1], arms=["online-only"])
    fitted = fit_to_machine(wanted, None, said.append)
    assert said[0] == "how fast is this machine? starting a server"
    assert said[-1] == "scale 2"
    assert fitted.speed is not None
    assert fitted.speed.stream_tps > 0
    run(fitted)
    described = ResultFolder(tmp_path / "out").description()
    assert (described.scale, described.parsed_scenario()) == (2.0, fitted.scenario)
    assert len(next(ResultFolder(tmp_path / "out").runs()).records) == 6
    again = fit_to_machine(replace(wanted, command="again"), None, said.append)
    assert (said[-1], again.scenario) == ("scale 2", fitted.scenario)
    assert len([line for line in said if "starting" in line]) == 1
    run(again)
    assert ResultFolder(tmp_path / "out").description().speed == described.speed
    with pytest.raises(ResultError, match=r"another scale: 2\.0, not 1"):
        run(fit_to_machine(wanted, 1.0, said.append))


def conversations(path: Path, tokens: int) -> Path:
    """A trace in Mooncake's manner, of 40 conversations that differ in length."""
    rows = [
        {
            "timestamp": 100 * i,
            "input_length": 600 + tokens * (i % 40) // 4,
            "output_length": 3,
            "hash_ids": [0, 1 + i % 40],
        }
        for i in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.usefixtures("dying")
def test_seeds_are_added_that_scale_the_trace_by_other_factors(model: Path, tmp_path: Path) -> None:
    arrivals = {
        "kind": "replay",
        "trace": "talk",
        "format": "mooncake",
        "keep_share": 0.3,
        "rate_rps": 5,
        "mean_prompt_tokens": 8,
        "mean_output_tokens": 3,
        "max_prompt_tokens": 20,
        "max_output_tokens": 3,
    }
    asked = {"arms": ["online-only"], "online": {"arrivals": arrivals}}
    first = plan(model, tmp_path / "out", seeds=[1], **asked)
    first = replace(first, traces={"talk": conversations(tmp_path / "talk.jsonl", 25)})
    run(first)
    more = plan(model, tmp_path / "out", seeds=[2], **asked)
    _, said = run(replace(more, traces=first.traces))
    assert order_of_starts(said) == ["online-only, seed 2"]
    described = ResultFolder(tmp_path / "out").description()
    assert described.scenario["seeds"] == [1, 2]
    assert len(set(described.scales)) == 2
    other = {"talk": conversations(tmp_path / "other.jsonl", 20)}
    with pytest.raises(ResultError, match="another trace"):
        run(replace(plan(model, tmp_path / "out", seeds=[3], **asked), traces=other))


@pytest.mark.usefixtures("dying")
def test_points_of_a_sweep_share_a_server_and_no_prompt(model: Path, tmp_path: Path) -> None:
    points = [{"name": f"n{n}", "x": n, "set": {"online.arrivals.num_requests": n}} for n in (2, 4)]
    _, said = run(plan(model, tmp_path / "out", seeds=[1], arms=["online-only"], points=points))
    assert order_of_starts(said) == ["online-only, seed 1"]
    by_point = {s.key.point: len(s.records) for s in ResultFolder(tmp_path / "out").runs()}
    assert by_point == {"n2": 2, "n4": 4}


def test_run_json_is_complete_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="cannot be read"):
        ResultFolder(tmp_path).description()
    (tmp_path / "run.json").write_text(json.dumps({"command": "x"}))
    with pytest.raises(ResultError, match="no field 'arms'"):
        ResultFolder(tmp_path).description()
