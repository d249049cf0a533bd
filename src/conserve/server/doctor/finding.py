"""One line of the report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    FACT = "fact"
    """Nothing to judge."""
    OK = "ok"
    WARNING = "warning"
    """It works, not as well as it could."""
    PROBLEM = "problem"
    """A start, or a request, fails."""


@dataclass(frozen=True, slots=True)
class Finding:
    section: str
    name: str
    text: str
    level: Level = Level.FACT
    fix: str = ""
    """What to do about it, in one sentence; empty for facts and what is well."""

    @classmethod
    def ok(cls, section: str, name: str, text: str) -> Finding:
        return cls(section, name, text, Level.OK)

    @classmethod
    def warning(cls, section: str, name: str, text: str, fix: str) -> Finding:
        return cls(section, name, text, Level.WARNING, fix)

    @classmethod
    def problem(cls, section: str, name: str, text: str, fix: str) -> Finding:
        return cls(section, name, text, Level.PROBLEM, fix)
