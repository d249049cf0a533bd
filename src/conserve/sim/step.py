"""One step of the simulated engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from conserve.core.latency import LatencyModel, StepShape
from conserve.core.looks import num_looks
from conserve.core.plan import Mode
from conserve.sim.request import SimRequest


@dataclass(slots=True)
class Step:
    """A plan as it was applied. Times in seconds on the virtual clock."""

    mode: Mode
    grants: dict[str, int] = field(default_factory=dict)
    shape: StepShape = field(default_factory=StepShape)
    stoppable: bool = False
    online_shape: StepShape = field(default_factory=StepShape)
    due_s: float = float("inf")
    forced_tokens: float = float("inf")
    """Those of the plan."""
    predicted_s: float = 0.0
    model: LatencyModel | None = None
    """What it was decided by, and is judged by while it runs."""
    producers: list[SimRequest] = field(default_factory=list)
    """Requests that it gives a token."""
    finishing: list[SimRequest] = field(default_factory=list)
    """Those for which it is the last."""
    num_online_tokens: int = 0
    num_recomputed_tokens: int = 0
    decided_s: float = 0.0
    expected_start_s: float = 0.0
    """Under async scheduling, when the step before it is predicted to end."""
    start_s: float = 0.0
    end_s: float = 0.0
    wait_s: float = 0.0
    """From its start until its forward begins: copies out of the blocks it may write to."""
    seconds: float = 0.0
    """What its forward takes if nobody stops it."""
    stopped: bool = False
    layers_between_looks: int = 0
    """At the stop signal; 0 in a step that cannot be stopped."""
    asked_s: float = math.inf
    """When it was asked to stop."""
    judged_s: float = -math.inf
    """When it is looked at again whether to stop it, if somebody waits for it."""

    def num_looks(self, num_layers: int) -> int:
        """At the stop signal; the end of the step is none."""
        every = self.layers_between_looks
        return num_looks(num_layers, every) if every else 0

    @property
    def num_offline_tokens(self) -> int:
        return self.shape.num_tokens - self.num_online_tokens

    def sum_up(self, live: Mapping[str, SimRequest]) -> None:
        """Make the shape anew from the grants: it is not what the plan said."""
        self.shape = shape = StepShape()
        for request_id, tokens in self.grants.items():
            request = live[request_id]
            context = request.num_computed_tokens - tokens
            if tokens == 1 and request.token_times_s:
                shape.add_decode(tokens, context)
            else:
                shape.add_prefill(tokens, context)
