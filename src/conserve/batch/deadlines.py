"""Which of one owner's batches goes first, what the engine is told, and how a deadline looks.

Pure: the moment and the recent harvest are arguments. `shares` is the same between owners.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from conserve.batch.lifecycle import Status
from conserve.batch.records import LiveBatch

MOST_URGENT = 1
# A batch whose slack is under this share of its remaining work, or this long, goes first.
RISK_SHARE = 0.25
RISK_SLACK_S = 60.0
# Slack is compared in bands, each this many times the one before; within a band, first come first
# served. Comparing it exactly would make two batches take turns, to the good of neither.
BAND_FACTOR = 4.0
FIRST_BAND_S = 600.0
# An estimate counts as so many lines that have ended, beside those that have.
ESTIMATE_LINES = 20

LiveDeadlineState = Literal["unknown", "on_track", "at_risk", "will_miss"]


@dataclass(frozen=True, slots=True)
class BatchView:
    """What the order knows of one live batch. Lower priority values go first, as in vLLM."""

    batch_id: str
    created_at: float
    priority: int
    due_at: float
    remaining_tokens: float
    model: str | None = None
    num_done: int = 0
    """Lines that have ended."""
    num_left: int = 0
    """Lines that have not; 0 while they are not counted."""
    tenant: str = ""
    is_paused: bool = False

    @property
    def line_tokens(self) -> float:
        """What one of the lines that are left is expected to take; 1 at least."""
        return max(1.0, self.remaining_tokens / max(1, self.num_left))


def view_of(batch: LiveBatch) -> BatchView:
    """Remaining work by what the batch's lines came to, and the less the more of them have ended by
    what was expected of them."""
    num_done = batch.completed + batch.failed
    left = batch.total - num_done
    if batch.status in (Status.CANCELLING, Status.FINALIZING) or batch.expiring:
        remaining = 0.0
    elif batch.total:
        expected = ESTIMATE_LINES * batch.estimated_tokens / batch.total
        came_to = batch.input_tokens + batch.output_tokens
        remaining = left * (expected + came_to) / (ESTIMATE_LINES + num_done)
    else:
        remaining = float(batch.estimated_tokens)
    return BatchView(
        batch.id,
        batch.created_at,
        batch.priority,
        batch.expires_at,
        remaining,
        batch.model,
        num_done,
        left,
        batch.tenant,
        batch.paused_at is not None,
    )


@dataclass(frozen=True, slots=True)
class RecentHarvest:
    """What offline work got lately, of `num_workers` workers together. `tokens_per_s` is None
    until there is something to tell."""

    tokens_per_s: float | None = None
    mean_output_tokens: float | None = None
    num_workers: int = 1


def work_s(tokens: float, harvest: RecentHarvest) -> float:
    """Seconds the harvest takes for `tokens`; 0 while nothing is known."""
    return tokens / harvest.tokens_per_s if harvest.tokens_per_s else 0.0


def slack_s(view: BatchView, now_s: float, harvest: RecentHarvest) -> float:
    """Laxity: time left before the batch is due, less the time it still needs alone."""
    return view.due_at - now_s - work_s(view.remaining_tokens, harvest)


def is_at_risk(view: BatchView, now_s: float, harvest: RecentHarvest) -> bool:
    threshold = max(RISK_SLACK_S, RISK_SHARE * work_s(view.remaining_tokens, harvest))
    return slack_s(view, now_s, harvest) < threshold


def is_hopeless(view: BatchView, now_s: float, harvest: RecentHarvest) -> bool:
    """Whether it would be late if it got the whole harvest from here on."""
    return slack_s(view, now_s, harvest) < 0


def slack_band(view: BatchView, now_s: float, harvest: RecentHarvest) -> float:
    """0 when at risk, then 1 up to 10 minutes of slack, 2 up to 40 minutes, and so on. Without end
    when hopeless: what goes first for its sake is late as well, and nothing is won."""
    slack = slack_s(view, now_s, harvest)
    if slack < 0:
        return math.inf
    if is_at_risk(view, now_s, harvest):
        return 0
    band, edge_s = 1, FIRST_BAND_S
    while slack > edge_s:
        band, edge_s = band + 1, edge_s * BAND_FACTOR
    return band


def order(views: Iterable[BatchView], now_s: float, harvest: RecentHarvest) -> list[BatchView]:
    """Live batches of one owner, the one to feed next first.

    What is at risk, and can be kept, goes before everything, least slack first. Then the user's
    priority, the band of slack, first come; the id settles ties, so that every server finds the
    same order.
    """

    def key(view: BatchView) -> tuple[float | int | str, ...]:
        band = slack_band(view, now_s, harvest)
        if band == 0:
            return (0, slack_s(view, now_s, harvest), view.created_at, view.batch_id)
        return (1, view.priority, band, view.created_at, view.batch_id)

    return sorted(views, key=key)


def engine_priority(view: BatchView, *, is_urgent: bool) -> int:
    """`priority` of the batch's requests inside the engine: 1 or more is offline, larger later."""
    return MOST_URGENT if is_urgent else MOST_URGENT + view.priority


def deadline_state(
    view: BatchView, finish_at: float | None, now_s: float, harvest: RecentHarvest
) -> LiveDeadlineState:
    """What to tell the user of a live batch before it is too late."""
    if now_s >= view.due_at:
        return "will_miss"
    if finish_at is None:
        return "unknown"
    if finish_at > view.due_at:
        return "will_miss"
    return "at_risk" if is_at_risk(view, now_s, harvest) else "on_track"
