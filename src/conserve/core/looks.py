"""How often a step that can be stopped looks whether it is to stop.

A stop is as quick as looks are close, and every look takes time from all that is in the step.
What one takes is learned: now and then a step looks seldom, a short one only once, and is compared
with those that look as they should.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from conserve.core.stopping import RESPONSE_SHARE

RESPONSE_S = 0.005
"""A stop answers within it, as long as looks are cheap."""
COST_SHARE = 0.01
"""Most of a step's time that looks may take; the least number of them may take more."""
LEAST_LOOKS = round(1 / RESPONSE_SHARE)
COMPARE_EVERY = 64
"""Of so many steps one looks seldom."""
SHORT_S = 0.05
"""An arrival may wait for such a step to end: it needs to look only once."""
LEAST_SEEN = 20
"""Steps of a kind before anything is believed of it."""
NEWEST_WEIGHT = 0.005
"""Of the newest step in the average over its kind, once there are as many as this makes."""
DISTURBED = 0.5
"""A step that is further off its prediction, as a share of it, says nothing about looks."""


def layers_between_looks(
    step_s: float, num_layers: int, *, look_s: float = 0.0, response_s: float = RESPONSE_S
) -> int:
    """Layers from one look to the next, at least 1, in a step predicted to take `step_s`.

    A stop answers within two such stretches: the one in which it is asked for, and one that a
    device has queued by then. At least LEAST_LOOKS looks, as far as there are layers; more only
    while they take no more than COST_SHARE of the step.
    """
    if step_s <= 0:
        return 1
    for_response = int(response_s / 2 / step_s * num_layers)
    most_looks = int(COST_SHARE * step_s / look_s) if look_s else num_layers
    for_cost = math.ceil(num_layers / max(1, most_looks))
    return max(1, min(num_layers // LEAST_LOOKS, max(for_response, for_cost)))


def num_looks(num_layers: int, every: int) -> int:
    """Looks in a step that looks before its first layer and at every `every`-th one."""
    return -(-num_layers // every)


@dataclass(slots=True)
class _Kind:
    """Mean and variance of what steps took beyond their prediction, in seconds, and the mean
    number of looks in them."""

    num: int = 0
    mean_s: float = 0.0
    variance: float = 0.0
    looks: float = 0.0

    def add(self, beyond_s: float, num_looks: int) -> None:
        self.num += 1
        weight = max(NEWEST_WEIGHT, 1 / self.num)
        off_s = beyond_s - self.mean_s
        self.mean_s += weight * off_s
        self.variance = (1 - weight) * (self.variance + weight * off_s * off_s)
        self.looks += weight * (num_looks - self.looks)

    @property
    def squared_error(self) -> float:
        """Of the mean."""
        return self.variance / min(self.num, 2 / NEWEST_WEIGHT)


@dataclass(slots=True)
class _Comparison:
    """Steps of about one length that look as they should, beside those that look seldom."""

    fewest: int
    """Looks in those that look seldom."""
    num: int = 0
    usual: _Kind = field(default_factory=_Kind)
    seldom: _Kind = field(default_factory=_Kind)

    def begins(self) -> bool:
        """Call as a step begins; returns whether it is to look seldom."""
        self.num += 1
        return self.num % COMPARE_EVERY == 0

    def ended(self, beyond_s: float, num_looks: int) -> None:
        kind = self.seldom if num_looks <= self.fewest else self.usual
        kind.add(beyond_s, num_looks)

    @property
    def look_s(self) -> float:
        """What one look takes, as far as it stands out of the noise of steps; 0 where unknown."""
        usual, seldom = self.usual, self.seldom
        if min(usual.num, seldom.num) < LEAST_SEEN:
            return 0.0
        error_s = 2 * math.sqrt(usual.squared_error + seldom.squared_error)
        return max(0.0, usual.mean_s - seldom.mean_s - error_s) / (usual.looks - seldom.looks)


class LookCost:
    """Told of every whole step that could be stopped. Times in seconds."""

    def __init__(self) -> None:
        self._short = _Comparison(fewest=1)
        self._long = _Comparison(fewest=LEAST_LOOKS)

    def layers_between(
        self, step_s: float, num_layers: int, *, response_s: float = RESPONSE_S
    ) -> int:
        """For the step that begins: `layers_between_looks`, or more of them to compare with."""
        steps = self._about(step_s)
        if steps.begins():
            return max(1, math.ceil(num_layers / steps.fewest))
        return layers_between_looks(step_s, num_layers, look_s=self.seconds, response_s=response_s)

    def ended(self, seconds: float, predicted_s: float, num_looks: int) -> None:
        """A step that was not stopped took so long."""
        if abs(seconds - predicted_s) <= DISTURBED * predicted_s:
            self._about(predicted_s).ended(seconds - predicted_s, num_looks)

    @property
    def seconds(self) -> float:
        """What one look takes at least, by all that was compared; 0 where that is unknown."""
        return max(self._short.look_s, self._long.look_s)

    def _about(self, step_s: float) -> _Comparison:
        return self._short if step_s <= SHORT_S else self._long
