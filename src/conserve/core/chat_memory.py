"""Room to remember: how much memory offline work leaves to conversations that pause."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from conserve.core.history import History
from conserve.core.latency import LatencyModel
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RequestView
from conserve.core.traffic import TrafficEstimate

MEMORY_S = 600.0
"""What is this old counts for a third: hits, and how running requests grew."""
REFRESH_S = 1.0
"""Between two looks at what the room is worth."""
HEADROOM = 1 / 8
"""Of the history that is kept, what conversations grow by at their next turn."""
STRANGERS = 20
"""After so many online requests in a row that continue no history, the least room is kept for
nobody: their kind does not come back."""


class Lost(NamedTuple):
    """What a conversation asked for again and did not find, because of offline work."""

    num_blocks: int = 0
    seconds: float = 0.0
    """What computing it again takes."""


class HitCurve:
    """Seconds of prefill that hits save per second, by the depth of history that they need; a
    decaying average."""

    PRIOR_S = 60.0
    """Time without a hit that it starts from."""

    def __init__(self, most: int) -> None:
        self._bounds = _bounds(most)
        self._saved_s = [0.0] * len(self._bounds)
        self._weight_s = self.PRIOR_S

    def spent(self, seconds: float) -> None:
        keep = math.exp(-seconds / MEMORY_S)
        self._saved_s = [saved_s * keep for saved_s in self._saved_s]
        self._weight_s = self._weight_s * keep + (1 - keep) * MEMORY_S

    def hit(self, depth: int, saved_s: float) -> None:
        """A hit that `depth` blocks of history make possible; beyond the last bound it is not."""
        place = bisect_left(self._bounds, depth)
        if place < len(self._bounds):
            self._saved_s[place] += saved_s

    def best_depth(self, weight: float, price: float) -> int:
        """The blocks for which `weight` times what they save, less `price` (both in seconds a
        second, the latter for each block), is most; 0 where it is never above 0."""
        best, best_depth, saved_s = 0.0, 0, 0.0
        for depth, more_s in zip(self._bounds, self._saved_s, strict=True):
            saved_s += more_s
            gain = weight * saved_s / self._weight_s - price * depth
            if more_s and gain > best:
                best, best_depth = gain, depth
        return best_depth


def _bounds(most: int) -> list[int]:
    """Depths up to `most`, each about a fifth above the one before."""
    bounds: list[int] = []
    depth = 1.0
    while round(depth) < most:
        bounds.append(round(depth))
        depth = max(depth * 1.2, depth + 1)
    return [*bounds, most] if most > 0 else bounds


class ChatMemory:
    """Told of every online request that comes and goes; answers how much room its kind needs.

    All times are passed in, in seconds; blocks go by names of their content.
    """

    def __init__(self, num_blocks: int, block_size: int, settings: PolicySettings) -> None:
        most = int(settings.room_max_share * num_blocks)
        self._least = min(int(settings.room_min_share * num_blocks), most)
        self._most = most
        self._weight = settings.room_weight
        self._block_size = block_size
        self._history = History(num_blocks)
        self._curve = HitCurve(most)
        self._wanted = 0
        self._intrusion = 0.0
        """Most blocks of the room that running requests took lately: those that start leave as many
        in addition."""
        self._was_free = False
        """Whether the room has been free since it last grew: if not, nobody has grown into it."""
        self._looked_s: float | None = None
        self._num_strangers = 0
        """Online requests in a row that continue nothing."""

    def started(self, names: Sequence[Hashable], num_cached: int, model: LatencyModel) -> Lost:
        """An online request is admitted for the first time. `names`: of the full blocks of its
        prompt, in order; the first `num_cached` of them were found."""
        history, size = self._history, self._block_size
        found = history.find(names)
        for start, count, depth in found:
            self._curve.hit(depth, model.prefill_work_s(count * size, start * size))
        num_lost = history.num_lost(names, num_cached)
        num_known = sum(count for _, count, _ in found)
        continues = num_known > 0 and 2 * num_known >= len(names)
        self._num_strangers = 0 if continues else self._num_strangers + 1
        history.drop(names[:num_known])
        return Lost(num_lost, model.prefill_work_s(num_lost * size, num_cached * size))

    def left(self, names: Sequence[Hashable]) -> None:
        """An online request lets go of its blocks; `names` of those that it has computed."""
        self._history.left(names)

    def driven_out(self, names: Iterable[Hashable]) -> None:
        """Blocks of online history are handed out while offline requests hold others."""
        self._history.driven_out(names)

    def room(
        self,
        now_s: float,
        running: Iterable[RequestView],
        num_free_blocks: int,
        traffic: TrafficEstimate,
    ) -> int:
        """Free blocks that offline requests which start must leave: those that are worth more as
        history, no more than there is history for, and what running ones will grow by."""
        if self._looked_s is None or not 0 <= now_s - self._looked_s < REFRESH_S:
            num_offline = sum(view.num_blocks for view in running if not view.online)
            self._look(now_s, traffic.harvest_price(num_offline))
        room = min(self._wanted, _with_headroom(len(self._history)))
        if num_free_blocks >= room:
            self._was_free = True
        elif self._was_free:
            self._intrusion = max(self._intrusion, room - num_free_blocks)
        return min(room + round(self._intrusion), self._most) if room else 0

    def _look(self, now_s: float, price: float) -> None:
        elapsed_s = 0.0 if self._looked_s is None else max(now_s - self._looked_s, 0.0)
        self._looked_s = now_s
        self._curve.spent(elapsed_s)
        self._intrusion *= math.exp(-elapsed_s / MEMORY_S)
        depth = self._curve.best_depth(self._weight, price)
        least = self._least if self._num_strangers < STRANGERS else 0
        wanted = max(min(_with_headroom(depth), self._most), least)
        self._was_free &= wanted <= self._wanted
        self._wanted = wanted

    def forget(self) -> None:
        """The prefix cache has been emptied."""
        self._history.clear()


def _with_headroom(num_blocks: int) -> int:
    return num_blocks + math.ceil(num_blocks * HEADROOM)
