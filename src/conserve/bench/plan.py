"""What `conserve bench run` was asked for, and how it is fitted to the machine."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from conserve.bench import machine
from conserve.bench.arms import arm_named
from conserve.bench.commands import server_command
from conserve.bench.ports import free_port
from conserve.bench.scale import Speed, scale_of
from conserve.bench.server import Server
from conserve.bench.speed import speed_of
from conserve.bench.store import ResultFolder
from conserve.sim.arms import ONLINE_ONLY
from conserve.workload import WHOLE, Scenario, build_workload

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """traces: paths by the names the scenario uses. scale: the machine's; the scenario is fitted
    to it. speed: what it was worked out from, if it was measured.

    share_servers: arms whose servers are started alike take turns on one, which saves its start.
    They are then sent different texts of the same lengths.

    cpu_dtype: what models are served in where there is no accelerator. vLLM by itself takes the
    model's own, however slow that is.
    """

    scenario: Scenario
    model: str
    folder: Path
    command: str
    traces: dict[str, Path] = field(default_factory=dict)
    server_args: tuple[str, ...] = ()
    cpu_dtype: str = "bfloat16"
    scale: float = 1.0
    speed: Speed | None = None
    share_servers: bool = False

    def every_server_args(self) -> list[str]:
        """What each arm's server gets."""
        return machine.server_args(self.scenario.server.args, self.server_args, self.cpu_dtype)


def fit_to_machine(plan: Plan, wanted: float | None, say: Say) -> Plan:
    """The plan at the scale that is wanted; for None at that of the folder's runs, or the
    machine's, which is measured. `plan` is at scale 1.

    Raises ScenarioError or TraceError before anything is measured, SpeedError, ServerDiedError.
    """
    trace_scales(plan)
    speed = None
    if wanted is None and (plan.folder / "run.json").is_file():
        wanted = ResultFolder(plan.folder).description().scale
    if wanted is None:
        speed = _measured(plan, say)
        wanted = scale_of(speed)
        say(f"  {speed}")
    say(f"scale {wanted:g}")
    return replace(plan, scenario=plan.scenario.at_scale(wanted), scale=wanted, speed=speed)


def trace_scales(plan: Plan) -> list[str]:
    """What each trace is multiplied by. Builds every workload once: a bad trace is found before
    a server is started."""
    scales: dict[str, None] = {}
    for point, scenario in plan.scenario.places().items():
        prefix = "" if point == WHOLE else f"{point}: "
        for seed in scenario.seeds:
            workload = build_workload(scenario, seed, plan.traces)
            scales.update(dict.fromkeys(f"{prefix}{scale}" for scale in workload.scales))
    return list(scales)


def _measured(plan: Plan, say: Say) -> Speed:
    """Of stock vLLM, which every arm is built on."""
    say("how fast is this machine? starting a server")
    port, log = free_port(), plan.folder / "logs" / "speed.log"
    targets = plan.scenario.targets.targets()
    with tempfile.TemporaryDirectory(prefix="conserve-bench-") as data:
        arm, args = arm_named(ONLINE_ONLY), plan.every_server_args()
        command = server_command(arm, plan.model, port, args, targets, Path(data))
        environment = machine.server_environment(plan.model)
        with Server(command, environment, port, log) as server:
            server.wait_until_healthy()
            return asyncio.run(speed_of(server.base_url, plan.model, plan.model))
