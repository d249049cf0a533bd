"""How many servers the deadlines of live batches ask for. Pure, as deadlines.py is."""

from __future__ import annotations

from collections.abc import Iterable

from conserve.batch.deadlines import BatchView, RecentHarvest

START_S = 600.0
"""A server that is added needs minutes until it harvests. What is due sooner counts as due then:
no server that starts could help it more."""


def due_tokens_per_s(views: Iterable[BatchView], now_s: float) -> float:
    """The rate at which every batch ends by its deadline, the nearest deadline first: of each
    deadline, the tokens that are due by then over the time left, and of these the most. What is
    overdue asks for nothing: it expires; nor does what is paused."""
    due_tokens, most = 0.0, 0.0
    for view in sorted(views, key=lambda view: view.due_at):
        if view.due_at > now_s and not view.is_paused:
            due_tokens += view.remaining_tokens
            most = max(most, due_tokens / max(START_S, view.due_at - now_s))
    return most


def workers_needed(views: Iterable[BatchView], now_s: float, harvest: RecentHarvest) -> float:
    """Workers that harvest so much, each at the mean rate that one had lately. A part of one is
    one that is busy for part of the time. While no rate is known, one, if anything is due: it
    will show the rate."""
    asked = due_tokens_per_s(views, now_s)
    if not harvest.tokens_per_s:
        return 1.0 if asked else 0.0
    return asked / harvest.tokens_per_s * harvest.num_workers
