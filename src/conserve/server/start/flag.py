"""What one of our own flags is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: its name, how its text is read, its default and a sentence of help."""

    name: str
    parse: Callable[[str], Any] | None
    """None for a switch, which takes no text."""
    default: object
    metavar: str
    help: str
