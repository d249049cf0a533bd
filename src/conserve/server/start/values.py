"""How the text of a flag's value is read. Each raises ArgumentTypeError with what it should be."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence

from conserve.core.settings import CHAT_SLOWDOWN

AUTO = "auto"
"""The value of a target that comes from the machine."""


def target(text: str) -> float | None:
    """None where it is the machine's to choose."""
    return None if text == AUTO else _number_that(text, lambda ms: ms > 0, "above 0 milliseconds")


def seconds(text: str) -> float:
    return _number_that(text, lambda value: value > 0, "above 0 seconds")


def interval(text: str) -> float:
    return _number_that(text, lambda value: value >= 0, "0 or more seconds")


def share(text: str) -> float:
    return _number_that(text, lambda value: 0 <= value < 1, "a share from 0 up to but not 1")


def part(text: str) -> float:
    return _number_that(text, lambda value: 0 <= value <= 1, "a share from 0 to 1")


def slowdown(text: str) -> float:
    """Levels have names; any other ratio is a number from 1 on."""
    if text in CHAT_SLOWDOWN:
        return CHAT_SLOWDOWN[text]
    wanted = f"{', '.join(CHAT_SLOWDOWN)} or a number from 1 on"
    return _number_that(text, lambda value: value >= 1, wanted)


def _number_that(text: str, holds: Callable[[float], bool], wanted: str) -> float:
    value = number(text)
    if not holds(value):
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")
    return value


def count(text: str) -> int:
    value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return value


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}")
    return value


SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", re.IGNORECASE)
"""A number of bytes: 8GiB, 8G (the same), 8GB (a thousand millions a piece), 1024."""


def size(text: str) -> int:
    match = SIZE.fullmatch(text.strip())
    value = 0
    if match:
        number, prefix, unit = match.groups()
        base = 1000 if (unit or "").lower() == "b" else 1024
        value = int(float(number) * base ** " kmgt".index(prefix.lower() if prefix else " "))
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 8GiB or 500MB, not {text!r}")
    return value


def one_of(words: Sequence[str]) -> Callable[[str], str]:
    """Reads one of these words."""

    def word(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(words)}, not {text!r}")
        return text

    return word


def folder(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must name a folder")
    return text


def file(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must name a file")
    return text
