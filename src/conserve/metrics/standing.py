"""Where an engine stands between chat alone and first come first served, by what it predicts.

Two figures, both over any span of time, as quotients of what `Standing.step` gives:

    chat's slowdown = chat_s / alone_s      how many times as long as alone its tokens take
    harvest share = tokens / bound_tokens   offline tokens computed, over those that steps filled
                                            without regard for chat would have computed meanwhile
"""

from __future__ import annotations

import math
from typing import NamedTuple

from conserve.core.latency import LatencyModel, StepShape
from conserve.metrics.bound import Bound, Crowd
from conserve.metrics.chat_gaps import ChatGaps

MEMORY_S = 60.0
LONGEST_STEP_S = 10.0
"""A longer pause between two steps counts as this one: nobody stood anywhere meanwhile."""


class Stood(NamedTuple):
    """What one step adds to the sums."""

    chat_s: float = 0.0
    """The seconds it took, once for each online decode in it."""
    alone_s: float = 0.0
    """What one gap between tokens would take alone, once for each that got its token."""
    bound_tokens: float = 0.0
    """Offline tokens that first come first served would have computed since the step before."""


class Standing:
    """Told of every step as it ends. Times are passed in, in seconds; what is told of late (in the
    last minute) tells what would be."""

    def __init__(self) -> None:
        self._chat = ChatGaps()
        self._bound = Bound()
        self._last_s: float | None = None

    def step(
        self,
        now_s: float,
        seconds: float,
        online: StepShape,
        offline: StepShape,
        model: LatencyModel,
        *,
        crowd: Crowd,
        max_tokens: int,
        stopped: bool = False,
    ) -> Stood:
        """A step with these two parts ended at `now_s`, `seconds` after it had begun.

        max_tokens: the most that any step computes. stopped: nothing of it was kept.
        """
        if seconds <= 0:
            return Stood()
        last_s = now_s - seconds if self._last_s is None else self._last_s
        since_s = min(now_s - last_s, LONGEST_STEP_S)
        self._last_s = now_s
        keep = math.exp(-since_s / MEMORY_S)
        num_given = 0 if stopped else online.num_decodes
        self._chat.fade(keep, since_s)
        self._chat.add(seconds, online, model, num_given)
        bound_tokens = 0.0
        if crowd.num_running or crowd.num_waiting:
            self._bound.passed(since_s, keep, crowd)
            if not stopped:
                self._bound.computed(online, offline)
            bound_tokens = since_s * self._bound.tokens_per_s(model, max_tokens)
        alone_s = num_given * self._alone_s(seconds, model) if num_given else 0.0
        return Stood(online.num_decodes * seconds, alone_s, bound_tokens)

    def _alone_s(self, seconds: float, model: LatencyModel) -> float:
        """Who never had company is alone."""
        return self._chat.alone_s(model) if self._bound.knows_offline_work else seconds
