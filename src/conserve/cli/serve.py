"""`conserve serve [MODEL] [any flag of vllm serve]`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from conserve.server.errors import BadInputError, EngineDiedError, StartError


def serve(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL] [FLAGS]", help="See `conserve serve --help`."),
    ] = None,
) -> None:
    """Serve online and offline requests from one vLLM engine (OpenAI's API)."""
    from conserve.server.start.interrupts import quiet

    try:
        with quiet():
            from conserve.server.start.serve import serve as run

            run([*(arguments or []), *context.args])
    except (BadInputError, StartError, EngineDiedError) as error:
        print(f"conserve serve: {error}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(2 if isinstance(error, BadInputError) else 1) from error
