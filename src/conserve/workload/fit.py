"""A scenario on a machine of another speed than the one it was made on.

On a slower machine requests get shorter, to a quarter at most; where that is not enough, the run
is the same in slow motion. On a faster machine the same requests come more often. The engine is
then as busy as on the machine the scenario was made on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SHORTEST = 0.25
"""Of a scenario's lengths: of a chat of 120 tokens in and 24 out, less would say nothing."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What a scenario's values are multiplied by. Each factor is above 0.

    tokens: tokens of a request.
    time: seconds between arrivals; above 1 it is slow motion.
    """

    tokens: float = 1.0
    time: float = 1.0

    @classmethod
    def to_scale(cls, scale: float, *, fixed_lengths: bool = False) -> Fit:
        """For a machine `scale` times as fast; `fixed_lengths` leaves requests as they are."""
        tokens = 1.0 if fixed_lengths else min(1.0, max(scale, SHORTEST))
        return cls(tokens, tokens / scale)

    @property
    def window(self) -> float:
        """Seconds of a run. It becomes longer in slow motion, and no shorter on a fast machine."""
        return max(self.time, 1.0)

    @property
    def requests(self) -> float:
        """Requests in a run."""
        return self.window / self.time

    @property
    def ttft(self) -> float:
        """The target for first tokens. Computing a prompt takes `time` as long; what a request
        costs beside that shrinks less on a faster machine."""
        return max(self.time, math.sqrt(self.time))

    @property
    def tbt(self) -> float:
        """The target between tokens. A decode step is bound by memory, which differs less from
        machine to machine than arithmetic does; but others' prompts come in between."""
        return max(self.time, math.sqrt(self.time / self.tokens))

    def length(self, num_tokens: int) -> int:
        return max(1, round(self.tokens * num_tokens))

    def count(self, num_requests: int) -> int:
        return max(1, round(self.requests * num_requests))
