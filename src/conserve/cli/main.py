"""The `conserve` command: one module a subcommand, added here."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from conserve import __version__
from conserve.cli.batch import app as batch
from conserve.cli.beginning import show_beginning
from conserve.cli.bench import app as bench
from conserve.cli.demo import demo
from conserve.cli.doctor import doctor
from conserve.cli.output import standard_output
from conserve.cli.plan import plan
from conserve.cli.serve import serve
from conserve.cli.sim import app as sim
from conserve.cli.top import top
from conserve.cli.usage import usage


class Commands(TyperGroup):
    """All of them print alike where nobody reads any more, or nothing can be written."""

    def invoke(self, ctx: Any) -> Any:
        with standard_output():
            return super().invoke(ctx)


app = typer.Typer(
    name="conserve",
    cls=Commands,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    help="Batch work in the idle time of an interactive vLLM server.",
)

# Every flag goes to `serve` as it is, --help included: vLLM's parser knows them all.
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(serve)
app.command()(demo)
app.add_typer(batch)
app.add_typer(bench)
app.add_typer(sim)
app.command()(plan)
app.command()(top)
app.command(context_settings={"ignore_unknown_options": True})(doctor)
app.command()(usage)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"conserve {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say which this is."),
    ] = False,
) -> None:
    """Runs before every subcommand, and alone where none is named."""
    if context.invoked_subcommand is None:
        show_beginning()


def main() -> None:
    app(prog_name="conserve")
