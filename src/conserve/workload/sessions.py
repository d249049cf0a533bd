"""Conversations: each turn's prompt is all that was said before it, and a new message."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

from pydantic import Field, model_validator

from .fit import Fit
from .lengths import Length
from .plan import RequestPlan
from .table import Table


class Pause(Table):
    """From an answer's last token to the next turn: lognormal around `median_s` with `sigma` of
    the logarithm, cut to [min_s, max_s]."""

    median_s: float = Field(gt=0)
    sigma: float = Field(default=0.0, ge=0)
    min_s: float = Field(default=0.0, ge=0)
    max_s: float = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Pause:
        if self.min_s > self.max_s:
            raise ValueError(f"min_s {self.min_s} is above max_s {self.max_s}")
        return self

    def draw(self, rng: Random) -> float:
        seconds = rng.lognormvariate(math.log(self.median_s), self.sigma)
        return min(max(seconds, self.min_s), self.max_s)

    def fitted(self, fit: Fit) -> Pause:
        return Pause(
            median_s=fit.time * self.median_s,
            sigma=self.sigma,
            min_s=fit.time * self.min_s,
            max_s=fit.time * self.max_s,
        )


class Sessions(Table):
    """One sort of conversation, such as a person's chats or an agent's tool calls.

    opening: tokens of the first prompt. message: what each later turn adds. answer: output tokens.
    A conversation ends after `max_turns`, or before a turn that would make it longer than
    `max_tokens`, or with the run. weight: of the scenario's conversations, so many in turn are of
    this sort.
    """

    weight: int = Field(default=1, ge=1)
    opening: Length
    message: Length
    answer: Length
    pause: Pause
    max_turns: int = Field(ge=1)
    max_tokens: int = Field(ge=1)

    def turns(self, name: str, arrival_s: float, rng: Random) -> Iterator[RequestPlan]:
        """The turns of the conversation called `name`, the first at `arrival_s`.

        Raises ValueError where not even the first fits `max_tokens`.
        """
        num_history_tokens, pause_s = 0, 0.0
        for turn in range(self.max_turns):
            said = self.message if turn else self.opening
            prompt, output = num_history_tokens + said.draw(rng), self.answer.draw(rng)
            if prompt + output > self.max_tokens:
                break
            yield RequestPlan(
                f"{name}-turn-{turn}" if turn else name,
                True,
                arrival_s,
                prompt,
                output,
                session=name,
                num_history_tokens=num_history_tokens,
                pause_s=pause_s,
            )
            num_history_tokens, pause_s = prompt + output, self.pause.draw(rng)
        if not num_history_tokens:
            raise ValueError(f"sessions: max_tokens {self.max_tokens} is too few for a first turn")

    def fitted(self, fit: Fit) -> Sessions:
        return self.model_copy(
            update={
                "opening": self.opening.fitted(fit),
                "message": self.message.fitted(fit),
                "answer": self.answer.fitted(fit),
                "pause": self.pause.fitted(fit),
                "max_tokens": fit.length(self.max_tokens),
            }
        )
