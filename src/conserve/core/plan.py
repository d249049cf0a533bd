"""What the policy decides for one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from conserve.core.latency import StepShape


class Mode(StrEnum):
    """Who is in the step: it names the limit the step was filled up to."""

    IDLE = "idle"
    ONLINE_PREFILL = "online_prefill"
    """Somebody waits for a first token: offline work may lengthen the step by a sliver."""
    ONLINE_DECODE = "online_decode"
    """Only resident decodes: offline work fills the slack of their next token."""
    OFFLINE = "offline"
    """No online request at all: the batch that harvests most."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One step, which nobody changes. A request absent from `grants` computes nothing."""

    mode: Mode
    grants: Mapping[str, int] = field(default_factory=dict)
    """request_id -> tokens it may compute, running and waiting requests alike."""
    displace: Sequence[str] = ()
    """Offline requests whose blocks (and slots, if they run) go to others."""
    checkpoint: Mapping[str, int] = field(default_factory=dict)
    """request_id -> leading tokens whose KV is to be on the host or on its way there."""
    restore: Mapping[str, int] = field(default_factory=dict)
    """request_id -> leading tokens of a waiting request to bring back into free blocks."""
    stoppable: bool = False
    """Nobody's first token is in it, and stopping it is not barred by the livelock rule."""
    online_shape: StepShape = field(default_factory=StepShape)
    """Its online part: what the next step computes beside the arrivals if this one is stopped."""
    due_s: float = float("inf")
    """When the first of its online decodes is due its token, stopped or not."""
    forced_tokens: float = float("inf")
    """Of prompts of online requests, what a step computes though such a token is due."""
    shape: StepShape = field(default_factory=StepShape)
    predicted_s: float = 0.0
    limit_s: float = float("inf")
    """The predicted time (with margin) that offline tokens were not allowed to pass."""
    num_online_tokens: int = 0
    num_offline_tokens: int = 0
    num_floor_tokens: int = 0
    """Offline tokens granted only because of `Targets.offline_floor`."""
