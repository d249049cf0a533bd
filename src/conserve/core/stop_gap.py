"""What the device stands idle behind a step that can be stopped: nothing is decided ahead of its
end."""

from __future__ import annotations

import math

LONGEST_GAP_S = 0.02
"""More is somebody else's doing."""
LEAST_GAPS = 5
"""One gap says little: until there are so many, none is believed."""
NEWEST_WEIGHT = 0.1
"""Of the newest gap in their average, once there are as many as this makes."""
FRESH_S = 5.0
"""Time in steps that the average is believed as it is without a new gap."""
HALF_LIFE_S = 30.0
"""After that it fades: it may itself forbid the steps that it is measured behind."""


class StopGap:
    """Told of every step that held tokens, oldest first, and of every turn that decided nothing.
    Times in seconds, of one clock."""

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._num_gaps = 0
        self._unmeasured_s = 0.0
        """Time in steps since the last gap."""
        self._last_end_s = -math.inf
        self._held_back = False
        self._ran_empty = False
        """Whether nothing was decided ahead of the last step's end, with requests left to run."""

    @property
    def seconds(self) -> float:
        """On average; 0 where that is not known."""
        if self._num_gaps < LEAST_GAPS:
            return 0.0
        stale_s = max(0.0, self._unmeasured_s - FRESH_S)
        return self._mean_s * math.pow(0.5, stale_s / HALF_LIFE_S)

    def held_back(self) -> None:
        """Nothing was decided while a step ran, only because it can be stopped."""
        self._held_back = True

    def stepped(self, launched_s: float, ended_s: float, *, work_left: bool) -> None:
        """A step is over, stopped or not. `work_left`: requests are left to run behind it."""
        if self._ran_empty:
            self._measured(launched_s - self._last_end_s)
        else:
            self._unmeasured_s += max(0.0, ended_s - max(launched_s, self._last_end_s))
        self._ran_empty = self._held_back and work_left
        self._held_back = False
        self._last_end_s = ended_s

    def _measured(self, seconds: float) -> None:
        before_s = self.seconds if self._num_gaps >= LEAST_GAPS else self._mean_s
        gap_s = min(max(seconds, 0.0), LONGEST_GAP_S)
        self._num_gaps += 1
        self._unmeasured_s = 0.0
        weight = max(NEWEST_WEIGHT, 1 / self._num_gaps)
        self._mean_s = before_s + weight * (gap_s - before_s)
