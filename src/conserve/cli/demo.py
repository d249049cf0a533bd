"""`conserve demo`: see it work, in five minutes and on any machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo(
    out: Annotated[Path, typer.Option(help="Folder for summaries, figures and picture.")] = Path(
        "out/demo"
    ),
    alone_s: Annotated[float, typer.Option(help="Seconds of chat without offline work.")] = 56.0,
    together_s: Annotated[
        float, typer.Option(help="Seconds of chat with offline work, at most.")
    ] = 168.0,
) -> None:
    """Summarise 79 documents in the idle time of a chat, on the default model."""
    from conserve.bench.demo.client import DemoError
    from conserve.bench.demo.results import table
    from conserve.bench.demo.run import DemoPlan, run_demo
    from conserve.server.errors import BadInputError
    from conserve.server.start.default_model import NAME, default_model

    console = Console()
    try:
        plan = DemoPlan(alone_s=alone_s, together_s=together_s)
        default_model()
        results = run_demo(NAME, _serve_command, out, plan)
    except (BadInputError, DemoError, OSError, ValueError) as error:
        print(f"conserve demo: {error}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1 if isinstance(error, DemoError) else 2) from error
    console.print(table(results))
    for name, path in (("summaries", results.summaries), ("picture", results.picture)):
        console.print(f"{name:10} {path}", soft_wrap=True)


def _serve_command(port: int) -> list[str]:
    start = "from conserve.cli.main import main; main()"
    flags = ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    # Batches that wait in the user's data folder must not run in the demo.
    return [sys.executable, "-c", start, "serve", "--no-batches", *flags]
