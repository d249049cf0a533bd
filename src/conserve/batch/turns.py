"""Which batches one worker takes lines from next, and how many of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from heapq import heapify, heappop, heappush

from conserve.batch.outlook import Outlook, Prospect

Turn = tuple[Prospect, int]
"""A batch, and the most lines to take from it."""


class Turns:
    """What is taken, and what it came to, counts at once, though the next look at the store is
    still to come."""

    def __init__(self) -> None:
        self._outlook: Outlook | None = None
        self._taken = defaultdict[str, float](float)

    def took(self, prospect: Prospect, num_lines: int) -> None:
        self._taken[prospect.view.tenant] += num_lines * prospect.line_cost

    def ended(self, batch_id: str, tokens: int) -> None:
        """A line has taken `tokens`, whatever was expected of it."""
        if self._outlook is not None and (prospect := self._outlook.prospects.get(batch_id)):
            surprise = tokens / prospect.view.line_tokens - 1.0
            self._taken[prospect.view.tenant] += prospect.line_cost * surprise

    def share_out(self, outlook: Outlook, waiting: Collection[str], num_free: int) -> list[Turn]:
        """Turns over the `waiting` batches of the outlook, for `num_free` lines in all at most:
        urgent batches first, then line by line the owner that has had least."""
        if outlook is not self._outlook:
            self._outlook = outlook
            self._taken.clear()
        turns = list[Turn]()
        queues = defaultdict[str, list[Prospect]](list)
        for batch_id, prospect in outlook.prospects.items():
            if batch_id not in waiting:
                continue
            if prospect.is_urgent:
                turns.append((prospect, min(num_free, prospect.num_waiting)))
                num_free -= turns[-1][1]
            else:
                queues[prospect.view.tenant].append(prospect)
        return [turn for turn in turns if turn[1]] + self._in_turn(queues, num_free)

    def _in_turn(self, queues: dict[str, list[Prospect]], num_free: int) -> list[Turn]:
        heap = [
            (queue[0].level + self._taken[tenant], tenant, 0, 0) for tenant, queue in queues.items()
        ]
        heapify(heap)
        given = dict[str, Turn]()
        while num_free > 0 and heap:
            level, tenant, at, num_lines = heappop(heap)
            prospect = queues[tenant][at]
            num_free, num_lines = num_free - 1, num_lines + 1
            given[prospect.view.batch_id] = (prospect, num_lines)
            if num_lines >= prospect.num_waiting:
                at, num_lines = at + 1, 0
            if at < len(queues[tenant]):
                heappush(heap, (level + prospect.line_cost, tenant, at, num_lines))
        return list(given.values())
