"""One URL of webhooks: how much it is asked at once, and for how long it is left alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

from conserve.batch.due import PUT_OFF_S

FIRST_DELAY_S, LONGEST_DELAY_S = 5.0, PUT_OFF_S
ENDPOINT_AT_ONCE = 4
"""Tries under way to one URL in one process."""
LONGEST_SILENCE_S = 60.0
"""An endpoint that does not answer is asked again after at most so long."""


class Endpoint:
    """One URL, whoever's it is: how much it is asked at once, and how long it is left alone.

    One that does not answer holds each try for as long as a try may take. So it gets few at once,
    and then for a while none: the tries of other endpoints wait for none of that. `now` is by a
    clock that nobody sets.
    """

    def __init__(self) -> None:
        self.num_tries = 0
        """Under way."""
        self.is_doubtful = True
        """Whether its latest try had no answer, or it has had none yet."""
        self.asked_at = -math.inf
        self._num_silent = 0
        """Tries in a row without an answer, those at once as one."""
        self._asked_again_at = 0.0

    def room(self, now: float) -> int:
        """How many more tries may begin: one where the last had no answer."""
        if now < self._asked_again_at:
            return 0
        return max(0, (1 if self._num_silent else ENDPOINT_AT_ONCE) - self.num_tries)

    @property
    def is_dead(self) -> bool:
        """Whether it has been silent for so long that it is asked as seldom as any ever is."""
        return delay_s(self._num_silent) >= LONGEST_SILENCE_S

    def begin(self, one: Coroutine[Any, Any, None], now: float) -> asyncio.Task[None]:
        """`one` try as a task, counted until it is over."""
        self.num_tries += 1
        self.asked_at = now
        task = asyncio.create_task(one)
        task.add_done_callback(self._is_over)
        return task

    def _is_over(self, _: object) -> None:
        self.num_tries -= 1

    def answers(self) -> None:
        """Whatever it says."""
        self._num_silent, self._asked_again_at, self.is_doubtful = 0, 0.0, False

    def is_silent(self, now: float) -> None:
        """A try had no answer. Those that ran beside it say no more."""
        self.is_doubtful = True
        if now < self._asked_again_at:
            return
        self._num_silent += 1
        self._asked_again_at = now + min(LONGEST_SILENCE_S, delay_s(self._num_silent))


def delay_s(attempts: int) -> float:
    """Before the next try: 5 s, 10 s, 20 s, ... up to an hour."""
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempts - 1, 20))
