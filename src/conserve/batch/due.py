"""When what was put off until some time of day may be taken up again, a lease's end among it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, or_

PUT_OFF_S = 3600.0
"""Nothing is put off for longer, and no lease is longer."""
CLOCKS_APART_S = 60.0
"""Clocks of two servers may differ by as much."""


def is_due(not_before: ColumnElement[Any], now: float) -> ColumnElement[bool]:
    """Also where the time is farther away than anything is put off: the clock has been set back
    since, and what it says then may be years away."""
    return or_(not_before <= now, not_before > now + PUT_OFF_S + CLOCKS_APART_S)
