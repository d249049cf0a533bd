"""When a request arrived, on the clock that the engine measures durations with."""

from __future__ import annotations

from typing import Any


def arrived_s(request: Any, now_s: float, wall_s: float) -> float:
    """`now_s` and `wall_s`: the present on the engine's clock and on the wall's.

    vLLM stamps a request in the API process by the wall clock, which may be set at any moment.
    Here its stamp becomes a time of a clock that only goes forward. Nothing arrives in the future.
    """
    return min(now_s, float(request.arrival_time) + (now_s - wall_s))
