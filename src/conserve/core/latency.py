"""How long a step takes, from what is in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NUM_FEATURES = 6
Features = tuple[float, float, float, float, float, float]


@dataclass(slots=True)
class StepShape:
    """What a step computes, summed over its requests.

    A chunk of p tokens behind c tokens of context reads p * c + p * p / 2 pairs in
    attention; a decode reads its context once.
    """

    num_tokens: int = 0
    attention_pairs: float = 0.0
    """Query-key pairs of prefill chunks."""
    num_decodes: int = 0
    decode_context: int = 0
    """KV tokens that the decodes read."""
    num_prefill_tokens: int = 0
    """Of the tokens; those of decodes are the others, several each where tokens are speculated."""

    def add_prefill(self, num_new: int, context: int) -> None:
        self.num_tokens += num_new
        self.num_prefill_tokens += num_new
        self.attention_pairs += num_new * (context + num_new / 2)

    def add_decode(self, num_new: int, context: int) -> None:
        self.num_tokens += num_new
        self.num_decodes += 1
        self.decode_context += context

    def less(self, part: StepShape) -> StepShape:
        """What is left of it without `part`; nowhere less than nothing."""
        return StepShape(
            max(0, self.num_tokens - part.num_tokens),
            max(0.0, self.attention_pairs - part.attention_pairs),
            max(0, self.num_decodes - part.num_decodes),
            max(0, self.decode_context - part.decode_context),
            max(0, self.num_prefill_tokens - part.num_prefill_tokens),
        )


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Step time in seconds: a roofline in tokens plus attention.

        T = fixed + per_token * max(n, knee) + per_pair * A + per_decode * D + per_context * C
            + per_activation * n

    with n tokens, A query-key pairs of prefill, D decodes and C tokens of decode
    context. Below `knee` tokens a step is bound by reading the weights; activations still
    move, within a device and between those of a model in parts. The paper's
    form, k1*P + k2*P*(P+C) + k4*(P+C) + k5, has no knee and no decode terms.
    """

    fixed: float
    per_token: float
    per_pair: float = 0.0
    per_decode: float = 0.0
    per_context: float = 0.0
    knee: float = 0.0
    per_activation: float = 0.0
    """Of every token, below the knee as well."""
    margin: float = 0.0
    """Relative error to leave room for: a step fits when predicted * (1 + margin) does."""

    @classmethod
    def of(cls, coefficients: Sequence[float], knee: float, margin: float = 0.0) -> LatencyModel:
        fixed, per_token, per_pair, per_decode, per_context, per_activation = coefficients
        return cls(
            fixed, per_token, per_pair, per_decode, per_context, knee, per_activation, margin
        )

    @property
    def coefficients(self) -> Features:
        return (
            self.fixed,
            self.per_token,
            self.per_pair,
            self.per_decode,
            self.per_context,
            self.per_activation,
        )

    @property
    def least_s(self) -> float:
        """Seconds that a step takes whatever is in it."""
        return self.fixed + self.per_token * self.knee

    @property
    def full_token_s(self) -> float:
        """Seconds by which a token lengthens a step that is past the knee, attention aside."""
        return self.per_token + self.per_activation

    def features(self, shape: StepShape) -> Features:
        return (
            1.0,
            max(float(shape.num_tokens), self.knee),
            shape.attention_pairs,
            float(shape.num_decodes),
            float(shape.decode_context),
            float(shape.num_tokens),
        )

    def predict_s(self, shape: StepShape) -> float:
        """Seconds the step takes; 0 for an empty one."""
        if not shape.num_tokens:
            return 0.0
        tokens = shape.num_tokens if shape.num_tokens > self.knee else self.knee
        return (
            self.fixed
            + self.per_token * tokens
            + self.per_pair * shape.attention_pairs
            + self.per_decode * shape.num_decodes
            + self.per_context * shape.decode_context
            + self.per_activation * shape.num_tokens
        )

    def predict_prefill_s(self, num_tokens: int, context: int = 0) -> float:
        """Seconds of a step with one prefill chunk and nothing else."""
        shape = StepShape()
        shape.add_prefill(num_tokens, context)
        return self.predict_s(shape)

    def prefill_work_s(self, num_tokens: int, context: int) -> float:
        """Seconds by which `num_tokens` of a prompt behind `context` lengthen steps that are full:
        what computing them costs others, or spares if they need not be."""
        pairs = num_tokens * (context + num_tokens / 2)
        return self.full_token_s * num_tokens + self.per_pair * pairs

    def fixed_s(self, shape: StepShape) -> float:
        """What of a step's time is there whatever is in it: more of the same would be free."""
        return self.fixed + self.per_token * max(0.0, self.knee - shape.num_tokens)

    def fitting_prefill_tokens(self, shape: StepShape, context: int, limit_s: float) -> int:
        """Largest chunk behind `context` tokens that keeps `shape` within limit_s, margin and all.

        The positive root of per_pair/2 * p^2 + (full_token_s + per_pair*context) * p = room,
        where the tokens up to the knee cost no per_token.
        """
        base = self.predict_s(shape) if shape.num_tokens else self.least_s
        room = limit_s / (1.0 + self.margin) - base
        if room < 0:
            return 0
        num_free = max(0.0, self.knee - shape.num_tokens)
        linear = self.per_activation + self.per_pair * context
        below = _chunk(room, linear, self.per_pair)
        if below <= num_free:
            return int(below)
        room += self.per_token * num_free
        return int(_chunk(room, self.per_token + linear, self.per_pair))


def _chunk(room: float, linear: float, per_pair: float) -> float:
    """Positive root p of per_pair/2 * p^2 + linear * p = room (2^31 where nothing bounds it)."""
    if per_pair <= 0:
        return room / linear if linear > 0 else 2.0**31
    # Not (sqrt(..) - linear) / per_pair, which cancels to nothing for a small per_pair.
    return 2 * room / (linear + math.sqrt(linear * linear + 2 * per_pair * room)) if room else 0.0
