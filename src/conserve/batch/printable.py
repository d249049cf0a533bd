"""Other people's words in a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with `?` for what would steer a terminal, or turn the line round."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
