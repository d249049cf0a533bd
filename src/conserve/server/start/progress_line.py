"""How the phases of a start are written.

vLLM's own lines come in between as they are. On a terminal our line leaves the cursor at its
beginning, and it is shorter than what vLLM puts before each of its lines: they cover it, and it is
written anew below them.
"""

from __future__ import annotations

import json
from collections.abc import Callable

Write = Callable[[str], None]

ERASE = "\r\x1b[K"


class LogLines:
    """A line a phase, with the seconds since the start at which it began."""

    def __init__(self, write: Write, *, as_json: bool) -> None:
        self._write, self._as_json = write, as_json

    def phase(self, at_s: float, name: str) -> None:
        message = f"ConServe at {at_s:.1f} s: {name}"
        if self._as_json:
            message = json.dumps({"message": message, "phase": name, "start_s": round(at_s, 3)})
        self._write(f"{message}\n")

    def goes_on(self, now_s: float) -> None:
        """Nothing: the line has been written."""

    def clear(self) -> None:
        """Nothing: a log is not written anew."""

    def over(self, now_s: float, ready: str) -> None:
        self.phase(now_s, ready)


class TerminalLine:
    """One line with the phase and the seconds it has taken; the last one stays."""

    def __init__(self, write: Write, columns: Callable[[], int]) -> None:
        self._write, self._columns = write, columns
        self._phase, self._began_s = "", 0.0

    def phase(self, at_s: float, name: str) -> None:
        self._phase, self._began_s = name, at_s

    def goes_on(self, now_s: float) -> None:
        text = f"ConServe: {self._phase}, {max(0.0, now_s - self._began_s):.0f} s"
        self._write(f"{ERASE}{text[: self._columns() - 1]}\r")

    def clear(self) -> None:
        self._write(ERASE)

    def over(self, now_s: float, ready: str) -> None:
        self._write(f"{ERASE}ConServe: {ready}, {now_s:.0f} s after the start\n")


def line_for(
    write: Write, *, is_terminal: bool, as_json: bool, columns: Callable[[], int]
) -> LogLines | TerminalLine:
    """What suits where it is read: a log with JSON is one on a terminal, too."""
    if is_terminal and not as_json:
        return TerminalLine(write, columns)
    return LogLines(write, as_json=as_json)
