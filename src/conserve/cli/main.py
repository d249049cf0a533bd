"""The `conserve` command: one module a subcommand, added here."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="conserve",
    no_args_is_help=True,
    add_completion=False,
    help="Batch work in the idle time of an interactive vLLM server.",
)


@app.callback()
def root() -> None:
    """Keep subcommands as subcommands while there is only one."""


def main() -> None:
    app()
