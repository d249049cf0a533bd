"""The command line of this process."""

from __future__ import annotations

import sys
from pathlib import Path


def repeatable() -> str:
    """The command as a reader can repeat it: absolute paths by their last name."""
    words = []
    for word in sys.argv[1:]:
        name, equals, value = word.rpartition("=")
        words.append(name + equals + (Path(value).name if value.startswith("/") else value))
    return " ".join(["conserve", *words])
