"""All batches of the store in a few numbers, for those who watch the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from conserve.batch.deadlines import BatchView, LiveDeadlineState
from conserve.batch.demand import workers_needed
from conserve.batch.ended import Sums
from conserve.batch.lifecycle import LIVE, Status
from conserve.batch.stores import Stores


@dataclass(frozen=True, slots=True)
class Overview:
    """Of every tenant's batches in the store, those of other servers that share it included.

    completed, failed, input_tokens, output_tokens: since the store was made.
    live_completed, live_failed, live_remaining: lines of batches that have not ended.
    live_paused: of those that remain, the ones of paused batches.
    finish_s: seconds until the last of them is expected to end; None while nothing is known.
    views: batches that have not ended, as they stood at `now_s`.
    workers_needed: for the deadlines of those whose model is among the ones that were named.
    """

    statuses: Mapping[Status, int]
    deadlines: Mapping[LiveDeadlineState, int]
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    live_completed: int
    live_failed: int
    live_remaining: int
    remaining_tokens: float
    harvest_tokens_per_s: float | None
    finish_s: float | None
    views: Sequence[BatchView] = ()
    now_s: float = 0.0
    workers_needed: float = 0.0
    live_paused: int = 0


async def overview(stores: Stores, now_s: float, models: Collection[str] | None = None) -> Overview:
    """`models` are those that whoever asks serves; None is any. Raises StoreUnavailableError."""
    by_status = await stores.ended.sums()
    # Looked at anew and last: what has ended by the sums is expected by nobody.
    stores.lookout.forget()
    outlook = await stores.lookout.outlook(now_s)
    prospects = outlook.prospects.values()
    views = [each.view for each in prospects]
    waits_s = [each.finish_at - now_s for each in prospects if each.finish_at is not None]
    every = _added(by_status.values())
    live = _added(sums for status, sums in by_status.items() if status in LIVE)
    live_remaining = live.total - live.completed - live.failed
    paused = sum(view.num_left for view in views if view.is_paused)
    return Overview(
        statuses={
            status: sums.num_batches for status, sums in by_status.items() if sums.num_batches
        },
        deadlines=Counter(each.state for each in prospects),
        completed=every.completed,
        failed=every.failed,
        input_tokens=every.input_tokens,
        output_tokens=every.output_tokens,
        live_completed=live.completed,
        live_failed=live.failed,
        live_remaining=live_remaining,
        live_paused=min(paused, live_remaining),  # the two are not of one moment
        remaining_tokens=sum(view.remaining_tokens for view in views),
        harvest_tokens_per_s=outlook.harvest.tokens_per_s,
        finish_s=max(waits_s, default=None),
        views=views,
        now_s=now_s,
        workers_needed=workers_needed(
            (view for view in views if models is None or view.model in (None, *models)),
            now_s,
            outlook.harvest,
        ),
    )


def _added(several: Iterable[Sums]) -> Sums:
    return Sums(*map(sum, zip(Sums(), *several, strict=True)))
