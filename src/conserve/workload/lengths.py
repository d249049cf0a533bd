"""How many tokens a request has, in and out: fixed, lognormal, or the rows of a trace."""

from __future__ import annotations

import math
from random import Random
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .fit import Fit
from .table import Table
from .trace_formats import TimestampUnit
from .traces import LengthFormat, Spelling


class Fixed(Table):
    """Every request has `tokens` tokens."""

    kind: Literal["fixed"]
    tokens: int = Field(ge=1)

    def draw(self, rng: Random) -> int:
        return self.tokens

    def fitted(self, fit: Fit) -> Fixed:
        return self.model_copy(update={"tokens": fit.length(self.tokens)})


class Lognormal(Table):
    """Lognormal around `median_tokens` with `sigma` of the logarithm, cut to [min, max]."""

    kind: Literal["lognormal"]
    median_tokens: float = Field(gt=0)
    sigma: float = Field(ge=0)
    min_tokens: int = Field(default=1, ge=1)
    max_tokens: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Lognormal:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self

    def draw(self, rng: Random) -> int:
        tokens = round(rng.lognormvariate(math.log(self.median_tokens), self.sigma))
        return min(max(tokens, self.min_tokens), self.max_tokens)

    def fitted(self, fit: Fit) -> Lognormal:
        return self.model_copy(
            update={
                "median_tokens": fit.tokens * self.median_tokens,
                "min_tokens": fit.length(self.min_tokens),
                "max_tokens": fit.length(self.max_tokens),
            }
        )


Length = Annotated[Fixed | Lognormal, Field(discriminator="kind")]


class Independent(Table):
    """Prompt and output lengths drawn apart from each other."""

    kind: Literal["independent"]
    prompt: Length
    output: Length

    def fitted(self, fit: Fit) -> Independent:
        lengths = {"prompt": self.prompt.fitted(fit), "output": self.output.fitted(fit)}
        return self.model_copy(update=lengths)


class TraceLengths(Table):
    """What the lengths of a trace's requests are brought to.

    timestamp_unit, block_tokens: of a trace in Mooncake's format that is not Mooncake's own.
    """

    trace: str
    format: LengthFormat
    timestamp_unit: TimestampUnit | None = None
    block_tokens: int | None = Field(default=None, ge=1)
    mean_prompt_tokens: float = Field(gt=0)
    mean_output_tokens: float = Field(gt=0)
    max_prompt_tokens: int = Field(ge=1)
    max_output_tokens: int = Field(ge=1)

    @model_validator(mode="after")
    def _only_mooncake_is_asked(self) -> TraceLengths:
        for name in ("timestamp_unit", "block_tokens"):
            if self.format != "mooncake" and getattr(self, name) is not None:
                raise ValueError(f"{name}: only the format mooncake has it")
        return self

    @property
    def spelling(self) -> Spelling:
        return Spelling(self.format, self.timestamp_unit, self.block_tokens)

    def fitted_lengths(self, fit: Fit) -> dict[str, float]:
        return {
            "mean_prompt_tokens": fit.tokens * self.mean_prompt_tokens,
            "mean_output_tokens": fit.tokens * self.mean_output_tokens,
            "max_prompt_tokens": fit.length(self.max_prompt_tokens),
            "max_output_tokens": fit.length(self.max_output_tokens),
        }


class Empirical(TraceLengths):
    """Pairs of prompt and output length drawn from the rows of the trace called `trace`.

    Prompts and outputs are multiplied by a factor each, so that the trace's means become
    `mean_prompt_tokens` and `mean_output_tokens`, then cut to the two maxima.
    """

    kind: Literal["trace"]

    def fitted(self, fit: Fit) -> Empirical:
        return self.model_copy(update=self.fitted_lengths(fit))


Lengths = Annotated[Independent | Empirical, Field(discriminator="kind")]
