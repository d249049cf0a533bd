"""The `conserve` command: one module a subcommand, added here."""

from __future__ import annotations

import typer

from conserve.cli.bench import app as bench
from conserve.cli.plan import plan
from conserve.cli.serve import serve
from conserve.cli.sim import app as sim

app = typer.Typer(
    name="conserve",
    no_args_is_help=True,
    add_completion=False,
    help="Batch work in the idle time of an interactive vLLM server.",
)

# Every flag goes to `serve` as it is, --help included: vLLM's parser knows them all.
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(serve)
app.command()(plan)
app.add_typer(bench)
app.add_typer(sim)


@app.callback()
def root() -> None:
    """Keep subcommands as subcommands while there is only one."""


def main() -> None:
    app()
