"""How busy the online side is: rates the policy weighs stops and slack with."""

from __future__ import annotations

import math


class TrafficEstimate:
    """Decaying averages over the engine's own time; the caller passes every duration in.

    `interruption_rate` is the hazard of an offline-only engine: arrivals that found it
    so, per second spent so. `online_residency` is the share of time with an online
    request in the engine, `offline_share` the share of step time offline tokens took.
    """

    MEMORY_S = 60.0
    PRIOR_S = 10.0
    """Weight of the prior belief: one interruption in this many offline-only seconds."""

    def __init__(self) -> None:
        self._interruptions = 1.0
        self._offline_only_s = self.PRIOR_S
        self._online_s = 0.0
        self._total_s = self.PRIOR_S
        self._offline_step_s = 0.0
        self._step_s = 1e-9

    @property
    def interruption_rate(self) -> float:
        return self._interruptions / self._offline_only_s

    @property
    def online_residency(self) -> float:
        return self._online_s / self._total_s

    @property
    def offline_share(self) -> float:
        return self._offline_step_s / self._step_s

    def spent(self, seconds: float, *, online_resident: bool) -> None:
        """The engine spent `seconds` since the last call, with an online request in it or not."""
        keep = math.exp(-seconds / self.MEMORY_S)
        self._total_s = self._total_s * keep + seconds
        self._online_s *= keep
        if online_resident:
            self._online_s += seconds
            return
        # Offline-only time forgets at its own pace, so that the rate is per second of it.
        self._interruptions *= keep
        self._offline_only_s = self._offline_only_s * keep + seconds

    def interrupted(self) -> None:
        """An online request came while there was none in the engine."""
        self._interruptions += 1.0

    def stepped(self, seconds: float, offline_seconds: float) -> None:
        """A step of `seconds` ended, of which offline tokens are charged `offline_seconds`."""
        keep = math.exp(-seconds / self.MEMORY_S)
        self._step_s = self._step_s * keep + seconds
        self._offline_step_s = self._offline_step_s * keep + offline_seconds
