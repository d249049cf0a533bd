"""How a command ends that cannot do what it was asked: one clear message, and an exit status."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from conserve.batch.printable import printable

PASSWORD = re.compile(r"(://[^\s/@:]*:)[^\s/@]*@")

notes = Console(stderr=True, highlight=False)


def fail(message: str) -> typer.Exit:
    """Say what failed; to be raised, for exit status 1."""
    note(f"error: {message}")
    return typer.Exit(1)


def note(message: str) -> None:
    """One line on stderr, also where it holds other people's words; without the passwords of
    addresses, since logs keep it."""
    message = PASSWORD.sub(r"\1***@", message)
    notes.print(printable(message), markup=False, emoji=False, soft_wrap=True)


@contextmanager
def clear_errors(command: str, *kinds: type[Exception]) -> Iterator[None]:
    """Bad input, which raises one of `kinds`, and files that cannot be read or made, as one
    message on stderr and status 2, without a traceback."""
    try:
        yield
    except kinds as error:
        raise _told(command, str(error)) from error
    except OSError as error:
        if error.filename is None:
            raise
        raise _told(command, f"{error.filename}: {error.strerror}") from error


def _told(command: str, message: str) -> typer.Exit:
    typer.echo(f"conserve {command}: {message}", err=True)
    return typer.Exit(2)
