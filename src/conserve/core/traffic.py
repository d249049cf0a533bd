"""How busy the online side is: rates the policy weighs stops and slack with."""

from __future__ import annotations

import math


class TrafficEstimate:
    """Decaying averages over the engine's own time; the caller passes every duration in.

    A duration counts as the integral of its decaying weight, so it does not matter
    whether an hour is passed in whole or in steps.

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
        self._offline_fixed_s = 0.0
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

    def harvest_price(self, num_offline_blocks: int) -> float:
        """What offline work would gain from one more block: seconds of steps, per second.

        More blocks are more requests in each step, which share its fixed cost: the harvest grows by
        the share of that cost in the steps' time for each per cent of blocks.
        """
        return self._offline_fixed_s / self._step_s / max(num_offline_blocks, 1)

    def spent(self, seconds: float, *, online_resident: bool) -> None:
        """The engine spent `seconds` since the last call, with an online request in it or not."""
        keep, weight_s = self._decay(seconds)
        self._total_s = self._total_s * keep + weight_s
        self._online_s *= keep
        if online_resident:
            self._online_s += weight_s
            return
        # Offline-only time forgets at its own pace, so that the rate is per second of it.
        self._interruptions *= keep
        self._offline_only_s = self._offline_only_s * keep + weight_s

    def interrupted(self) -> None:
        """An online request came while there was none in the engine."""
        self._interruptions += 1.0

    def stepped(self, seconds: float, offline_seconds: float, fixed_share: float = 0.0) -> None:
        """A step of `seconds` ended, of which offline tokens are charged `offline_seconds`; a step
        of its shape spends `fixed_share` of its time whatever is in it."""
        keep, weight_s = self._decay(seconds)
        self._step_s = self._step_s * keep + weight_s
        share = offline_seconds / seconds if seconds > 0 else 0.0
        self._offline_step_s = self._offline_step_s * keep + share * weight_s
        self._offline_fixed_s = self._offline_fixed_s * keep + share * fixed_share * weight_s

    def _decay(self, seconds: float) -> tuple[float, float]:
        """What `seconds` leave of the past, and what they weigh themselves."""
        forgotten = -math.expm1(-seconds / self.MEMORY_S)
        return 1.0 - forgotten, forgotten * self.MEMORY_S
