"""Why an engine did not start, told to who started it.

Engine and workers are processes of their own: what the API process sees is that one has ended. So
each process writes the errors that vLLM logs to a file that the API process names.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path

PLACE = "CONSERVE_FAULTS_FILE"
"""Name of the environment variable with the file's."""


class FaultWriter(logging.Handler):
    """Puts the first exception that is logged into the file, as a line. A server that has started
    may log others for months, which nobody asks for."""

    def __init__(self, place: Path) -> None:
        super().__init__(logging.ERROR)
        self._place = place

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or self._place.exists():
            return
        try:
            with self._place.open("a") as file:
                file.write(json.dumps([type(error).__name__, str(error)]) + "\n")
        except FileNotFoundError:
            return  # its folder went with who asked
        except OSError:
            self.handleError(record)


def write_faults() -> None:
    """In this process; nothing where nobody asks, and once however often it is called."""
    place, logger = os.environ.get(PLACE), logging.getLogger("vllm")
    if place and not any(isinstance(one, FaultWriter) for one in logger.handlers):
        logger.addHandler(FaultWriter(Path(place)))


def first_fault(place: Path) -> tuple[str, str] | None:
    """The name of the first error's class and what it says; those that come after follow from it,
    since a worker's is logged before its engine's. None without one that was written whole."""
    for line in place.read_text().splitlines() if place.exists() else ():
        with suppress(ValueError):
            kind, text = json.loads(line)
            return kind, text
    return None
