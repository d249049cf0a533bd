"""The first request whose tier and priority contradict each other is worth a warning: whoever sends
it may take larger priorities for the more urgent ones, or the other way round."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

PROMPT_TIERS = ("default", "priority", "scale")
"""Those that ask to be served at once. `auto` leaves it open."""
OTHER_ORDER = {"lower-first": "higher-first", "higher-first": "lower-first"}


def contradiction(tier: object, priority: int, order: str) -> str | None:
    """What to say of such a request, if it is one. priority: as it was sent, in this `order`."""
    urgency = -priority if order == "lower-first" else priority
    if tier == "flex" and urgency > 0:
        verdict = "by the tier offline, by the priority more urgent than other chats; it is offline"
    elif tier in PROMPT_TIERS and urgency < 0:
        verdict = "by the tier online, by the priority offline; it is offline"
    else:
        return None
    return (
        f"A request has service_tier {tier!r} and priority {priority}: {verdict}. If its sender "
        f"means the opposite order of priorities, start with --priority-order {OTHER_ORDER[order]}."
    )


class Contradictions:
    """Says the first one."""

    def __init__(self, order: str) -> None:
        self._order = order
        self._said = False

    def look(self, tier: object, priority: int) -> None:
        if self._said:
            return
        if text := contradiction(tier, priority, self._order):
            self._said = True
            logger.warning(text)
