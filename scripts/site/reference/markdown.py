"""Pieces of Markdown."""

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def code(text: object) -> str:
    return f"`{text}`"


def prose(text: str) -> str:
    """A sentence of the code's, with what looks like code shown as it is and not as Markdown."""
    words = " ".join(text.split())
    outside = words.split("`")
    for index in range(0, len(outside), 2):
        outside[index] = outside[index].replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[")
    return "`".join(outside)


def page(title: str, intro: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", intro, *parts]) + "\n"
