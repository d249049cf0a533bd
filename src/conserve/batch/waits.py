"""How long live batches have got nothing: whether one starves is told by no single look at it."""

from __future__ import annotations

from collections.abc import Iterable

from conserve.batch.deadlines import BatchView


class Waits:
    """Told of all live batches now and then, as they stand at that moment."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[int, float]] = {}
        """batch_id -> how many of its lines had ended, and since when as many."""

    def longest_s(self, views: Iterable[BatchView], now_s: float) -> float:
        """Seconds since a line of a batch ended, or since the batch was made where none has; of one
        that is first seen under way, since then, and of one that was paused, since it is no more.
        The longest of those that have lines left to run; 0 without any."""
        self._since = {
            view.batch_id: self._since_when(view, now_s)
            for view in views
            if view.remaining_tokens > 0
        }
        return max((now_s - since_s for _, since_s in self._since.values()), default=0.0)

    def _since_when(self, view: BatchView, now_s: float) -> tuple[int, float]:
        if view.is_paused:
            return view.num_done, now_s
        known = self._since.get(view.batch_id)
        if known is not None and known[0] == view.num_done:
            return known
        began_s = view.created_at if not view.num_done else now_s
        return view.num_done, began_s
