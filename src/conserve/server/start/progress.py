"""What a start is at, for who waits for it: on a terminal one line that is written anew, in a log
one line a phase."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conserve.engine import phases
from conserve.server.start.progress_line import LogLines, TerminalLine, line_for

LOOK_S = 0.2
STDERR = 2

Line = LogLines | TerminalLine


class Progress:
    """Follows the phases that all processes of a start tell, until the server is ready."""

    def __init__(self, place: Path, line: Line, began_s: float) -> None:
        self._place, self._line, self._began_s = place, line, began_s
        self._num_said = 0
        self._last, self._ready, self._is_open = "", "", _never
        self._lock = threading.Lock()
        self.is_over = False
        """Whether the server was seen to be ready."""

    def ends(self, phase: str, text: str, is_open: Callable[[], bool]) -> None:
        """The start is over when `phase` has begun and `is_open` says so; `text` tells it."""
        self._last, self._ready, self._is_open = phase, text, is_open

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Others may write to the terminal in the block."""
        with self._lock:
            self._line.clear()
            yield

    def look(self, now_s: float) -> bool:
        """Say what has begun since the last look; returns whether the start is over."""
        with self._lock:
            told = list(phases.begun(self._place))
            for phase, at_s in told[self._num_said :]:
                if phase != self._last:
                    self._line.phase(at_s - self._began_s, phase)
            self._num_said = len(told)
            over = any(phase == self._last for phase, _ in told) and self._is_open()
            self.is_over = self.is_over or over
            if over:
                self._line.over(now_s - self._began_s, self._ready)
            elif told:
                self._line.goes_on(now_s - self._began_s)
            return over


@contextmanager
def shown(*, as_json: bool) -> Iterator[Progress]:
    """Around the life of a server: its start is shown on stderr."""
    line = line_for(_write, is_terminal=_is_terminal(), as_json=as_json, columns=_columns)
    with tempfile.NamedTemporaryFile(prefix="conserve-phases-") as file:
        os.environ[phases.PLACE] = file.name
        progress = Progress(Path(file.name), line, time.monotonic())
        ended = threading.Event()
        thread = threading.Thread(
            target=_follow, args=(progress, ended), name="conserve-progress", daemon=True
        )
        thread.start()
        try:
            yield progress
        finally:
            ended.set()
            thread.join()
            with suppress(KeyError):
                del os.environ[phases.PLACE]


def _follow(progress: Progress, ended: threading.Event) -> None:
    while not ended.wait(LOOK_S):
        if progress.look(time.monotonic()):
            return
    progress.look(time.monotonic())
    with progress.aside():
        pass


def _never() -> bool:
    return False


def _write(text: str) -> None:
    """Past Python's own streams: a process that vLLM forks must not find their locks taken."""
    with suppress(OSError):
        os.write(STDERR, text.encode())


def _is_terminal() -> bool:
    return os.isatty(STDERR) and os.environ.get("TERM", "dumb") != "dumb"


def _columns() -> int:
    try:
        return os.get_terminal_size(STDERR).columns
    except OSError:
        return 80
