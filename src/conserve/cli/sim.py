"""`conserve sim`: a scenario on a virtual clock, on GPUs that are not here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from conserve.bench.selection import narrowed, scenario_file, trace_paths
from conserve.bench.store import Description, ResultFolder, RunKey
from conserve.cli import command_line
from conserve.cli.failures import clear_errors
from conserve.cli.output import for_tables, written
from conserve.metrics import write_records
from conserve.sim.arms import ARMS
from conserve.sim.first_token_table import first_token_table
from conserve.sim.own_targets import describe, with_targets
from conserve.sim.profiles import Profile, known_names, load_profile
from conserve.sim.ratios import ratio_rows
from conserve.sim.study import Cell, Study, table
from conserve.workload import WHOLE, Scenario, ScenarioError, load_scenario

app = typer.Typer(
    name="sim",
    no_args_is_help=True,
    help="The same policy on a virtual clock: no GPU, no vLLM.",
)

DEFAULT_PROFILE = "h100/llama-3.1-8b"

ProfileOption = Annotated[
    str, typer.Option(help="GPU[xN]/MODEL, or a measured profile's .toml; see `conserve sim list`.")
]
TraceOption = Annotated[
    list[str] | None,
    typer.Option(help="PATH of the trace the scenario replays, or NAME=PATH for each."),
]
AsyncOption = Annotated[
    bool, typer.Option("--async-scheduling", help="Decide a step while the one before runs.")
]


@app.command()
def run(
    scenario: Annotated[
        str, typer.Argument(help="A TOML file, or the name of one that comes along.")
    ],
    profile: ProfileOption = DEFAULT_PROFILE,
    arms: Annotated[str | None, typer.Option(help="These arms only, with commas between.")] = None,
    seeds: Annotated[str | None, typer.Option(help="These seeds only, with commas.")] = None,
    trace: TraceOption = None,
    out: Annotated[Path | None, typer.Option(help="A folder for records and figures.")] = None,
    chrome_trace: Annotated[
        bool, typer.Option(help="Also write a trace of each run for Perfetto, into --out.")
    ] = False,
    async_scheduling: AsyncOption = False,
) -> None:
    """Run a scenario under each of its arms, and print medians over seeds."""
    with clear_errors("sim", ValueError):
        if chrome_trace and out is None:
            raise ScenarioError("--chrome-trace: give the folder with --out")
        given = narrowed(load_scenario(scenario_file(scenario)), arms, seeds)
        traces = trace_paths(given.trace_names(), trace or [])
        machine = load_profile(profile)
        picked = with_targets(given, machine)
        study = Study(picked, machine, traces, async_scheduling, keep_steps=chrome_trace)
        cells = []
        if out:
            _check_folder(out)
            _describe(out, picked, machine)
        for cell in study.cells():
            cells.append(cell)
            if out:
                _store(out, cell, chrome_trace=chrome_trace)
        typer.echo(f"simulated: {machine.name}, {machine.about}")
        for line in describe(machine) if picked is not given else ():
            typer.echo(line)
        for told in _scales(cells):
            typer.echo(f"trace {told}")
        if lasting := _lasting(picked, cells):
            typer.echo(_drawn(picked, lasting))
            if out:
                _describe(out, lasting, machine)
        compared = ratio_rows(cells)
        if len(compared) > 1:
            typer.echo("beside chat alone, and first come first served:")
            _show(compared)
            typer.echo()
        _show(table(cells))
        if any(cell.first_token_parts for cell in cells):
            typer.echo("\nwhat first tokens waited for:")
            _show(first_token_table(cells))


@app.command()
def validate(
    results: Annotated[Path, typer.Argument(help="A folder that `conserve bench run` wrote.")],
    profile: Annotated[str, typer.Option(help="The profile measured on that machine.")],
    seeds: Annotated[str | None, typer.Option(help="These seeds only, with commas.")] = None,
    trace: TraceOption = None,
    async_scheduling: AsyncOption = False,
    out: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
) -> None:
    """Simulate the runs of a real benchmark and print both, with the simulator's error."""
    from conserve.sim.validation import RealRun, compare, markdown

    with clear_errors("sim", ValueError):
        folder = ResultFolder(results)
        scenario = folder.description().parsed_scenario()
        chosen = narrowed(scenario, None, seeds).seeds
        runs = [
            RealRun(r.key.point, r.key.arm, r.key.seed, r.records)
            for r in folder.runs()
            if r.key.seed in chosen
        ]
        traces = trace_paths(scenario.trace_names(), trace or [])
        machine = load_profile(profile)
        text = markdown(compare(scenario, runs, machine, traces, async_scheduling=async_scheduling))
        if out:
            with written(out) as target:
                target.write(text.encode())
        typer.echo(text, nl=False)


@app.command(name="list")
def list_known() -> None:
    """Name the GPUs, models and arms that can be simulated."""
    for kind in ("gpus", "models"):
        typer.echo(f"{kind}: {', '.join(known_names(kind))}")
    typer.echo("arms:")
    for arm in ARMS.values():
        typer.echo(f"  {arm.name:26} {arm.shows}")


def _scales(cells: Sequence[Cell]) -> list[str]:
    """What each trace was multiplied by, point by point of a sweep."""
    told = {
        scale if cell.point == WHOLE else f"{cell.point}: {scale}": None
        for cell in cells
        for scale in cell.scales
    }
    return list(told)


def _lasting(scenario: Scenario, cells: Sequence[Cell]) -> Scenario | None:
    """With as many offline requests as it took; None where its own were enough."""
    most = max((cell.num_offline for cell in cells), default=0)
    if scenario.offline is None or most <= scenario.offline.num_requests:
        return None
    offline = scenario.offline.model_copy(update={"num_requests": most})
    return scenario.model_copy(update={"offline": offline})


def _drawn(asked: Scenario, lasting: Scenario) -> str:
    assert asked.offline is not None
    assert lasting.offline is not None
    return (
        f"{lasting.offline.num_requests:,} offline requests, since the scenario's "
        f"{asked.offline.num_requests:,} ran out"
    )


def _check_folder(out: Path) -> None:
    """Raises ScenarioError where measured runs would be lost."""
    folder = ResultFolder(out)
    if (out / "run.json").is_file() and "simulated" not in folder.description().machine:
        raise ScenarioError(f"--out: {out} holds runs that were measured: name another folder")


def _describe(out: Path, scenario: Scenario, profile: Profile) -> None:
    ResultFolder(out).write_description(
        Description(
            command=command_line.repeatable(),
            started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            model=profile.name,
            machine={"simulated": f"{profile.name}, {profile.about}"},
            versions={},
            environment={},
            scenario=scenario.model_dump(mode="json"),
            arms={name: {"shows": ARMS[name].shows} for name in scenario.arms if name in ARMS},
        )
    )


def _store(out: Path, cell: Cell, *, chrome_trace: bool) -> None:
    from conserve.sim.chrometrace import write_trace

    folder, key = ResultFolder(out), RunKey(cell.point, cell.arm, cell.seed)
    path = folder.records_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_records(path, cell.records)
    # No machine was probed: there is none.
    counters = {"start": {}, "end": cell.counters.as_dict(), "probe_gflops": 0.0}
    folder.counters_path(key).write_text(json.dumps(counters, indent=1, sort_keys=True) + "\n")
    if chrome_trace:
        name = f"{cell.point}.{cell.arm}.seed-{cell.seed}.trace.json"
        write_trace(out / name, cell.steps, cell.records)


def _show(rows: list[list[str]]) -> None:
    whole = all(row[0] in ("point", "all") for row in rows)
    shown = Table(*(rows[0][1:] if whole else rows[0]), box=None)
    for row in rows[1:]:
        shown.add_row(*(row[1:] if whole else row))
    for_tables(200).print(shown)
