"""`conserve demo`: see it work, in six minutes and on any machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo(
    out: Annotated[Path, typer.Option(help="Folder for summaries, figures and picture.")] = Path(
        "out/demo"
    ),
    alone_s: Annotated[
        float | None,
        typer.Option(help="Seconds of chat without offline work. [default: 56, less on some]"),
    ] = None,
    together_s: Annotated[
        float | None,
        typer.Option(
            help="Seconds of chat with offline work, at most. [default: 168, less on some]"
        ),
    ] = None,
) -> None:
    """Summarise documents in the idle time of a chat, on the default model."""
    from conserve.bench.demo.client import DemoError
    from conserve.bench.demo.plan import Wanted
    from conserve.bench.demo.results import table
    from conserve.bench.demo.run import Subject, run_demo
    from conserve.server.errors import BadInputError
    from conserve.server.start.default_model import NAME, default_model
    from conserve.server.start.vllm_there import check_vllm

    console = Console()
    try:
        check_vllm()
        wanted = Wanted(alone_s, together_s)
        subject = Subject(NAME, str(default_model()), _serve_command)
        results = run_demo(subject, out, wanted)
    except (BadInputError, DemoError, OSError, ValueError) as error:
        print(f"conserve demo: {error}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1 if isinstance(error, DemoError) else 2) from error
    console.print(table(results))
    for name, path in (("summaries", results.summaries), ("picture", results.picture)):
        console.print(f"{name:10} {path}", soft_wrap=True)


def _serve_command(port: int, flags: Sequence[str]) -> list[str]:
    start = "from conserve.cli.main import main; main()"
    own = ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    # Batches that wait in the user's data folder must not run in the demo.
    return [sys.executable, "-c", start, "serve", "--no-batches", *own, *flags]
