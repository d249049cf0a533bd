"""`conserve bench`: run a scenario, report, compare, publish."""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from conserve.bench.store import ResultError
from conserve.cli import command_line
from conserve.cli.failures import clear_errors, fail
from conserve.server.errors import BadInputError
from conserve.workload import ScenarioError, TraceError

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    help="Every arm side by side, on real servers, in one command.",
)


@app.command()
def run(
    scenario: Annotated[
        str, typer.Argument(help="A TOML file, or the name of one that comes along.")
    ],
    model: Annotated[
        str | None, typer.Option(help="A folder or hub name; the default model if not given.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write, or to go on with. [default: out/bench/SCENARIO]"),
    ] = None,
    arms: Annotated[str | None, typer.Option(help="These arms only, with commas between.")] = None,
    seeds: Annotated[str | None, typer.Option(help="These seeds only, with commas.")] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(help="PATH of the trace the scenario replays, or NAME=PATH for each."),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="How fast the machine is beside the one the scenarios were made on, as a "
            "number, or auto: measured."
        ),
    ] = "auto",
    server_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="One more argument for every arm's server, as --server-arg=--flag=value."
        ),
    ] = None,
) -> None:
    """Start each arm's server in turn, send it the scenario, and write a report.

    A folder that already holds runs of this benchmark is added to: what is there is not repeated.
    """
    from conserve.bench.plan import Plan, fit_to_machine
    from conserve.bench.report.write import write_report
    from conserve.bench.runner import Runner
    from conserve.bench.selection import chosen, scale_named, scenario_file, trace_paths
    from conserve.bench.server import ServerDiedError
    from conserve.bench.speed import SpeedError
    from conserve.server.start.dtype import multiplies_bfloat16_here
    from conserve.server.start.vllm_there import check_vllm

    with _clear_errors():
        check_vllm()
        wanted = scale_named(scale)
        picked = chosen(scenario_file(scenario), arms, seeds)
        plan = Plan(
            scenario=picked,
            model=model or _default_model(),
            folder=out or Path("out/bench") / picked.name,
            command=command_line.repeatable(),
            traces=trace_paths(picked.trace_names(), trace or []),
            server_args=tuple(server_arg or []),
            cpu_dtype="bfloat16" if multiplies_bfloat16_here() else "float32",
        )
        # A runner that is told to end must end its servers too.
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            failures = Runner(fit_to_machine(plan, wanted, typer.echo), typer.echo).run()
        except (SpeedError, ServerDiedError) as error:
            raise fail(str(error)) from None
        except KeyboardInterrupt:
            typer.echo(
                "stopped; finished runs are kept, and the same command goes on with the rest"
            )
            if any(plan.folder.glob("records/*/*.jsonl.gz")):
                write_report(plan.folder)
            raise typer.Exit(130) from None
        typer.echo(f"report: {write_report(plan.folder)}")
        if failures:
            raise typer.Exit(1)


@app.command()
def report(folder: Path) -> None:
    """Make the report of a result folder again, from its stored records."""
    from conserve.bench.report.write import write_report

    with _clear_errors():
        typer.echo(write_report(folder))


@app.command()
def compare(
    before: Path,
    after: Path,
    anyway: Annotated[
        bool, typer.Option(help="Even across machines, models, scales or scenarios.")
    ] = False,
) -> None:
    """Put two result folders side by side, arm by arm."""
    from conserve.bench.report.compare import compare_folders

    with _clear_errors():
        typer.echo(compare_folders(before, after, anyway))


@app.command()
def publish(
    folder: Path,
    root: Annotated[Path, typer.Option(help="The repository.")] = Path(),
    name: Annotated[
        str, typer.Option(help="What to call it there, instead of its scenario's name.")
    ] = "",
) -> None:
    """Copy a result into benchmarks/results and fill in the numbers that the documents quote."""
    from conserve.bench.report.publish import publish_result

    with _clear_errors():
        for line in publish_result(folder, root, name):
            typer.echo(line)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _default_model() -> str:
    from conserve.server.start.default_model import default_model

    return str(default_model())


def _clear_errors() -> AbstractContextManager[None]:
    return clear_errors("bench", ScenarioError, TraceError, ResultError, BadInputError)
