"""Spans of time as people read them."""

from __future__ import annotations


def span(seconds: float) -> str:
    """In two units at most, such as "2 h 5 min"."""
    rest, parts = int(seconds), []
    for name, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        number, rest = divmod(rest, size)
        if number:
            parts.append(f"{number} {name}")
    return " ".join(parts[:2]) or "0 s"
