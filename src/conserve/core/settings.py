"""The policy's own settings: shares, ratios and caps, none of them a latency target."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

CHAT_SLOWDOWN = {"gentle": 1.1, "balanced": 1.58, "greedy": 0.0}
"""The levels by name."""


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Bounded, complete, refused early. Every field is a share, a ratio or a count."""

    chat_slowdown: float = CHAT_SLOWDOWN["balanced"]
    """How many times as long as its online part alone a step with online decodes may take, as the
    latency model predicts both; 0 leaves that to the targets. They hold all the same."""
    prefill_stretch: float = 0.02
    """How much offline work may lengthen a step that carries an online first token."""
    min_slack_fill: float = 0.35
    """Least share of the TBT slack that offline work fills beside online decodes.

    The share used is the online residency, at least this. Where online requests come
    and go, every online token costs one step whatever its length, so a shorter step
    harvests no less over time and an arrival waits less for it; where they never go,
    the share is 1 and steps are as long as the target allows."""
    stoppable_slack_fill: float = 0.5
    """Most of the TBT slack that offline work fills in a step that can be stopped: the rest is
    for the step that follows a stop, which carries the arrivals and owes the same tokens."""
    patience: float = 0.01
    """Share of the TTFT target an arrival may wait for a step that could be stopped."""
    unstoppable_share: float = 0.1
    """Longest offline step that cannot be stopped, as a share of the TTFT target."""
    stop_gap_share: float = 0.1
    """Most of a stoppable step's time that the device may stand idle behind it. Where the gap is
    more, a step that is short enough to be left alone cannot be stopped, and the next is decided
    while it runs."""
    max_stops: int = 3
    """After this many stops in a row a request's next step is not stopped."""
    min_chunk: int = 32
    """Prefill tokens a step carries even where every limit is passed already (progress)."""
    fixed_step_tokens: int = 0
    """If positive, an ablation: this token budget for every step instead of the targets."""
    displacement: bool = True
    """False is an ablation: waiting online requests never displace running offline ones."""
    class_aware: bool = True
    """Whether free blocks that only offline requests used are handed out before those that an
    online request used. False is an ablation: the least recently used first, whoever used it."""

    room_weight: float = 10.0
    """Seconds of harvest that a second of prefill which a returning conversation is spared is
    worth: how dear its memory may be to offline work."""
    room_min_share: float = 0.2
    """Least share of KV memory that offline requests leave to conversations that pause, as far as
    there are any: until it is known what their memory is worth, or that none comes back."""
    room_max_share: float = 0.8
    """Most of KV memory that they leave, whatever the least; 0 leaves what happens to be free."""

    def __post_init__(self) -> None:
        for name in (
            "prefill_stretch",
            "min_slack_fill",
            "stoppable_slack_fill",
            "patience",
            "unstoppable_share",
            "stop_gap_share",
            "room_min_share",
            "room_max_share",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if self.chat_slowdown and not 1 <= self.chat_slowdown < math.inf:
            raise ValueError(f"chat_slowdown must be at least 1, or 0, not {self.chat_slowdown}")
        for name, least in (("max_stops", 0), ("min_chunk", 1), ("fixed_step_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

        if not 0 <= self.room_weight < math.inf:
            raise ValueError(f"room_weight must not be negative, not {self.room_weight}")

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]
