"""What a run computed, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass


@dataclass(slots=True)
class Counters:
    """Tokens obey P7: computed = useful + recomputed + dropped (`check`)."""

    num_steps: int = 0
    num_stopped_steps: int = 0
    computed_tokens: int = 0
    useful_tokens: int = 0
    recomputed_tokens: int = 0
    """Computed before, and lost to a displacement or preemption."""
    dropped_tokens: int = 0
    """In steps that were stopped."""
    online_tokens: int = 0
    """Of the computed ones, those of online requests."""
    checkpointed_tokens: int = 0
    restored_tokens: int = 0
    reclaimed_tokens: int = 0
    """Found again in blocks that nobody had taken since."""
    lost_history_tokens: int = 0
    """Of conversations, what had to be computed again because of offline work."""
    lost_history_s: float = 0.0
    """What that takes, as the policy's model has it."""
    num_displaced: int = 0
    """Offline requests that made room for waiting online ones."""
    num_preempted: int = 0
    """Requests that lost their blocks because a running one needed another."""
    busy_s: float = 0.0
    """Time in steps."""
    chat_s: float = 0.0
    chat_alone_s: float = 0.0
    bound_tokens: float = 0.0
    """Where the policy says that it stands (`metrics.standing.Stood`), summed; 0 of a stock arm."""
    prediction_error: float = 0.0
    """Mean of |predicted - actual| / actual over whole steps, where the arm predicts."""

    def check(self) -> None:
        """Raises AssertionError if the tokens do not add up."""
        parts = self.useful_tokens + self.recomputed_tokens + self.dropped_tokens
        assert self.computed_tokens == parts, f"P7: {self}"

    @property
    def harvested_tokens(self) -> int:
        """Offline tokens that were computed for the first time, and kept."""
        return self.useful_tokens - self.online_tokens

    def since(self, earlier: Counters) -> Counters:
        """What came after `earlier`, a copy of these; the error is that of the whole run."""
        then = astuple(earlier)
        found = Counters(*(now - before for now, before in zip(astuple(self), then, strict=True)))
        found.prediction_error = self.prediction_error
        return found

    def as_dict(self) -> dict[str, float]:
        return asdict(self)
