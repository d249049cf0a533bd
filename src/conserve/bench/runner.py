"""Runs a scenario: every arm's server in turn, arms interleaved over seeds."""

from __future__ import annotations

import subprocess
import tempfile
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from conserve.bench import load, machine
from conserve.bench.arms import Arm, arm_named
from conserve.bench.commands import server_command
from conserve.bench.plan import Plan, Say, trace_scales
from conserve.bench.ports import free_port
from conserve.bench.report.figures import values_of
from conserve.bench.server import Server, ServerDiedError
from conserve.bench.store import Description, ResultError, ResultFolder, Run, RunKey
from conserve.workload import Scenario

POLL_S = 0.5


class Runner:
    """Runs what a plan's folder does not hold yet. Ctrl-C ends servers and keeps finished runs."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self._plan = plan
        self._say = say
        self._folder = ResultFolder(plan.folder)
        self._arms = [arm_named(name) for name in plan.scenario.arms]
        self._failures: dict[RunKey, str] = {}

    def run(self) -> dict[RunKey, str]:
        """Returns the runs that failed, with the reason. Raises ScenarioError, TraceError."""
        self._describe()
        for index, seed in enumerate(self._plan.scenario.seeds):
            # Another arm begins each round, so that drift of the machine favours none.
            first = index % len(self._arms)
            for arms in self._on_one_server(self._arms[first:] + self._arms[:first]):
                self._round(arms, seed)
        return self._failures

    def _on_one_server(self, arms: list[Arm]) -> list[list[Arm]]:
        """Neighbours whose servers are started alike take turns on one, where the plan says so."""
        if not self._plan.share_servers:
            return [[arm] for arm in arms]
        return [list(alike) for _, alike in groupby(arms, self._start)]

    def _start(self, arm: Arm) -> tuple[list[str], dict[str, str]]:
        return self._command(arm, 0, Path("DATA")), self._environment(arm)

    def _describe(self) -> None:
        """Write run.json, or see that the folder's is of the same benchmark."""
        plan = self._plan
        description = Description(
            command=plan.command,
            started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            model=Path(plan.model).name,
            machine=machine.describe_machine(),
            versions=machine.versions(),
            environment=self._without_paths_of_here(machine.server_environment(plan.model)),
            scenario=plan.scenario.model_dump(mode="json"),
            arms={arm.name: self._describe_arm(arm) for arm in self._arms},
            scales=trace_scales(plan),
            scale=plan.scale,
            speed=asdict(plan.speed) if plan.speed else None,
        )
        for scale in description.scales:
            self._say(f"trace {scale}")
        if (plan.folder / "run.json").is_file():
            old = self._folder.description()
            _check_traces(old, plan)
            description = _added_to(old, description, plan.folder)
        self._folder.write_description(description)

    def _describe_arm(self, arm: Arm) -> dict[str, str]:
        settings = [f"{name}={value}" for name, value in self._environment(arm).items()]
        command = [*settings, "python", *self._command(arm, 8000, Path("DATA"))[1:]]
        words = machine.hide_paths(command, {self._plan.model: Path(self._plan.model).name})
        return {"shows": arm.shows, "kind": arm.kind, "command": " ".join(words)}

    def _without_paths_of_here(self, environment: dict[str, str]) -> dict[str, str]:
        return {
            name: ":".join(Path(part).name for part in value.split(":"))
            if name == "LD_PRELOAD"
            else value
            for name, value in environment.items()
        }

    def _command(self, arm: Arm, port: int, data_dir: Path) -> list[str]:
        targets = self._plan.scenario.targets.targets()
        args = self._plan.every_server_args()
        return server_command(arm, self._plan.model, port, args, targets, data_dir)

    def _environment(self, arm: Arm) -> dict[str, str]:
        """What the arm's server gets beside what all get."""
        offline = self._plan.scenario.offline
        found = dict(arm.environment)
        if arm.batch and offline is not None and offline.in_flight != "all":
            # As many lines at once as the other arms send requests.
            found["CONSERVE_BATCH_MAX_IN_FLIGHT"] = str(offline.in_flight)
        return found

    def _left(self, arms: list[Arm], seed: int) -> list[tuple[Arm, RunKey, Scenario]]:
        """What the folder does not hold yet of all points of these arms: point after point, since
        arms are compared at one point, and a run that is cut off has the first ones whole."""
        return [
            (arm, key, scenario)
            for point, scenario in self._plan.scenario.places().items()
            for arm in arms
            if not self._folder.has(key := RunKey(point, arm.name, seed))
        ]

    def _round(self, arms: list[Arm], seed: int) -> None:
        """All points of these arms and one seed, on one fresh server."""
        left = self._left(arms, seed)
        if not left:
            return
        arm = arms[0]
        names = " and ".join(arm.name for arm in arms)
        self._say(f"{names}, seed {seed}: starting {'its' if len(arms) == 1 else 'their'} server")
        port = free_port()
        log = self._folder.log_path(arm.name, seed)
        environment = machine.server_environment(self._plan.model) | self._environment(arm)
        try:
            with (
                tempfile.TemporaryDirectory(prefix="conserve-bench-") as data,
                Server(self._command(arm, port, Path(data)), environment, port, log) as server,
            ):
                self._say(f"  ready in {server.wait_until_healthy():.0f} s")
                speed, warm_up = machine.probe_gflops(), True
                while left:
                    self._one(*left[0], server, warm_up=warm_up, probe_gflops=speed)
                    left.pop(0)
                    warm_up = False
        except ServerDiedError as error:
            for _, key, _ in left:
                self._fail(key, str(error))

    def _one(
        self,
        arm: Arm,
        key: RunKey,
        scenario: Scenario,
        server: Server,
        *,
        warm_up: bool,
        probe_gflops: float,
    ) -> None:
        """One run. Its records appear under their name only when it is whole."""
        final = self._folder.records_path(key)
        partial = final.with_name(f"partial-{final.name}")
        partial.parent.mkdir(parents=True, exist_ok=True)
        job = load.Job(
            base_url=server.base_url,
            model=self._plan.model,
            scenario=scenario.model_dump(mode="json"),
            seed=key.seed,
            text=self._text_of(key),
            traces={name: str(path) for name, path in self._plan.traces.items()},
            online=arm.online,
            offline=arm.offline,
            offline_fields=dict(arm.offline_fields),
            batch=arm.batch,
            warm_up=warm_up,
            probe_gflops=probe_gflops,
            records=str(partial),
            counters=str(self._folder.counters_path(key)),
        )
        log = server.log.with_suffix(".client.log")
        why = _drive(load.start(job, log), server) and _last_line(log)
        if why:
            self._fail(key, why)
            return
        partial.rename(final)
        self._say(f"  {key}: {_in_short(self._folder.run(key), scenario)}")

    def _text_of(self, key: RunKey) -> str:
        """Every arm is sent the same text, but for arms of one server: the second would find the
        first one's in the prefix cache."""
        arm = f"/{key.arm}" if self._plan.share_servers else ""
        return f"{key.point}/{key.seed}{arm}"

    def _fail(self, key: RunKey, why: str) -> None:
        self._failures[key] = why
        self._folder.write_failures(self._failures)
        self._say(f"  {key}: FAILED: {why}")


def _drive(client: subprocess.Popen[bytes], server: Server) -> int:
    """Wait for the client while watching the server; returns the client's exit status.

    Raises ServerDiedError. However this is left, the client has ended.
    """
    try:
        while client.poll() is None:
            server.check()
            time.sleep(POLL_S)
    finally:
        client.terminate()
        try:
            client.wait(timeout=10)
        except subprocess.TimeoutExpired:
            client.kill()
            client.wait()
    server.check()
    return client.returncode


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"the client: {lines[-1] if lines else 'ended without a word'}"


def _in_short(run: Run, scenario: Scenario) -> str:
    """One line for the terminal while the benchmark goes on."""
    found = values_of(run, scenario.duration_s, scenario.targets.targets())
    s = {name: value for name, value in found.items() if value is not None}
    parts = []
    if "ttft_p99_s" in s and "tbt_p99_s" in s:
        parts.append(f"TTFT p99 {s['ttft_p99_s']:.2f} s, TBT p99 {s['tbt_p99_s'] * 1000:.0f} ms")
    if s["offline_tps"]:
        parts.append(f"offline {s['offline_rps']:.2f} requests/s, {s['offline_tps']:.0f} tokens/s")
    if failed := s["num_online_failed"] + s["num_offline_failed"]:
        parts.append(f"{failed:.0f} requests failed")
    return "; ".join(parts) or "nothing was finished"


def _added_to(old: Description, new: Description, folder: Path) -> Description:
    """The description of a folder that more arms and seeds of one benchmark are added to.

    Raises ResultError unless the runs of both may stand in one table.
    """
    for name in ("model", "machine", "versions", "environment", "scale"):
        if getattr(old, name) != getattr(new, name):
            raise ResultError(
                f"{folder} holds a benchmark with another {name}: "
                f"{getattr(old, name)}, not {getattr(new, name)}. Name another folder with --out."
            )
    if old.workload() != new.workload():
        raise ResultError(f"{folder} holds another scenario. Name another folder with --out.")
    union = {
        name: list(dict.fromkeys([*old.scenario[name], *new.scenario[name]]))
        for name in ("arms", "seeds")
    }
    return replace(
        new,
        command=old.command if new.command in old.command else f"{old.command}; {new.command}",
        started=old.started,
        speed=old.speed,
        scenario={**new.scenario, **union},
        arms={**old.arms, **new.arms},
        scales=list(dict.fromkeys([*old.scales, *new.scales])),
    )


def _check_traces(old: Description, plan: Plan) -> None:
    """Raises ResultError unless the plan's traces give the folder's seeds what they were given:
    each seed reads another part of a trace, and multiplies it by factors of its own."""
    scenario = plan.scenario.model_copy(update={"seeds": old.scenario["seeds"]})
    scales = trace_scales(replace(plan, scenario=scenario))
    if set(scales) != set(old.scales):
        raise ResultError(
            f"{plan.folder} holds runs of another trace: scaled by {old.scales}, where --trace "
            f"gives {scales}. Name another folder with --out."
        )
