"""The time of day for a page that lives on the differences between its moments."""

from __future__ import annotations

import time
from collections.abc import Callable


def steady_clock() -> Callable[[], float]:
    """Seconds since the epoch, as the wall clock says when this is called; from then on they pass
    as time does, whatever the wall clock is set to."""
    ahead_s = time.time() - time.monotonic()
    return lambda: time.monotonic() + ahead_s
