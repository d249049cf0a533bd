"""Stops of steps at layers drawn at random, by rank 0 of an engine in this process."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from conserve.engine.flag import StopFlag

NUM_STOPS: dict[int, int] = {}
"""Step -> the layer at which it stopped."""


def stop_at_random(share: float) -> AbstractContextManager[Any]:
    """Have this share of all looks at the flag find it up."""
    chance, lead = random.Random(0), StopFlag.lead

    def lead_and_stop(self: StopFlag, step: int, point: int) -> bool:
        if chance.random() < share:
            self.raise_for(step)
        if stops := lead(self, step, point):
            NUM_STOPS[step] = point
        return stops

    return patch.object(StopFlag, "lead", lead_and_stop)
