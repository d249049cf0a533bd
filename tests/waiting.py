"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

LIMIT_S = 480.0
"""Far beyond what anything here takes on a slow machine; below the time a test may take."""


def eventually(true: Callable[[], bool]) -> None:
    """Until it is so. Fails after `LIMIT_S`."""
    deadline_s = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline_s, "still not so"
        time.sleep(0.1)
