"""What the start of a server is at, told to who started it.

Engine and workers are processes of their own. So each process writes the phase that begins with it
to a file that the first one names, with the time on the clock that all processes share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import current_process
from pathlib import Path

PLACE = "CONSERVE_PHASES_FILE"
"""Name of the environment variable with the file's."""

IMPORTING = "importing vLLM"
UNPACKING = "unpacking the model, once"
ENGINE = "starting the engine process"
WORKER = "starting its worker"
LOADING = "loading the model"
WARMING_UP = "taking KV memory, warming up"
PROFILING = "profiling step times"
API = "starting the API"
READY = "ready"
NAMES = (IMPORTING, UNPACKING, ENGINE, WORKER, LOADING, WARMING_UP, PROFILING, API, READY)
"""In the order in which they begin. Unpacking and profiling are not in every start."""


def are_told() -> bool:
    """Whether somebody asks for them."""
    return PLACE in os.environ


def begin(phase: str) -> None:
    """Tell that it begins; nothing where nobody asks."""
    if place := os.environ.get(PLACE):
        with suppress(OSError), open(place, "a") as file:
            file.write(f"{time.monotonic()} {phase}\n")


def begin_in_engine(phase: str) -> None:
    """The same, in a process that vLLM made for an engine only."""
    if current_process().name.startswith("EngineCore"):
        begin(phase)


def begun(place: Path) -> Iterator[tuple[str, float]]:
    """Each phase that has been told once, and when it began (as `time.monotonic`): ranks and
    replicas all tell theirs, and the first of them counts."""
    told: set[str] = set()
    for line in place.read_text().splitlines(keepends=True):
        at_s, _, phase = line.rstrip("\n").partition(" ")
        if line.endswith("\n") and phase not in told:
            told.add(phase)
            yield phase, float(at_s)
