"""How a command ends that cannot do what it was asked: one clear message, and an exit status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

notes = Console(stderr=True, highlight=False)


def fail(message: str) -> typer.Exit:
    """Say what failed; to be raised, for exit status 1."""
    notes.print(f"error: {message}", markup=False, soft_wrap=True)
    return typer.Exit(1)


@contextmanager
def clear_errors(command: str, *kinds: type[Exception]) -> Iterator[None]:
    """Bad input, which raises one of `kinds`, as one message on stderr and status 2, without a
    traceback."""
    try:
        yield
    except kinds as error:
        typer.echo(f"conserve {command}: {error}", err=True)
        raise typer.Exit(2) from error
