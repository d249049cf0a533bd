"""What the demo sends, fitted to the machine: pure, from what was measured of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

from conserve.bench.scale import Speed, scale_of
from conserve.workload.arrivals import Bursts
from conserve.workload.fit import Fit

FASTEST = 0.25
"""How much sooner than at scale 1 bursts come at most: beyond, they grow."""
PROMPT_TOKENS, TOKENS_A_WORD = 55, 1.35
"""Of a question without its passage, the chat template included; of the passage."""
ROOM = 2.0
"""Targets over what the slowest chat of a burst needs alone."""


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """How long each period lasts, in seconds, and what comes in it. The defaults are what a
    machine of scale 1 gets.

    The second period ends when the last document is summarised, `together_s` at the latest.
    Both periods repeat the same bursts, with different questions. patience_s: how long after the
    first period its last chats are waited for.
    """

    scale: float = 1.0
    alone_s: float = 56.0
    together_s: float = 168.0
    num_bursts: int = 7
    burst_size: int = 6
    excerpt_words: int = 100
    chat_tokens: int = 40
    page_words: int = 1000
    summary_tokens: int = 64
    num_documents: int = 79
    in_flight: int = 24
    ttft_target_s: float = 1.0
    tbt_target_s: float = 0.2
    sample_s: float = 1.0
    seed: int = 7

    @property
    def num_chats(self) -> int:
        """Within one span of `alone_s`."""
        return self.num_bursts * self.burst_size

    @property
    def patience_s(self) -> float:
        return 10 * (self.ttft_target_s + self.chat_tokens * self.tbt_target_s)

    @property
    def has_default_targets(self) -> bool:
        default = DemoPlan()
        mine = (self.ttft_target_s, self.tbt_target_s)
        return mine == (default.ttft_target_s, default.tbt_target_s)

    def arrivals_s(self) -> list[float]:
        """When chats come within one span of `alone_s`."""
        bursts = Bursts(
            kind="bursts",
            num_requests=self.num_chats,
            burst_size=self.burst_size,
            burst_span_s=min(0.1, self.alone_s / self.num_bursts / 2),
        )
        return bursts.times(Random(self.seed), self.alone_s)  # noqa: S311 - a schedule


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for; None is the machine's to say.

    Raises ValueError for a period of no time.
    """

    alone_s: float | None = None
    together_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("alone_s", "together_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 seconds, not {value:g}")


def plan_for(speed: Speed, left_s: float, wanted: Wanted) -> DemoPlan:
    """The demo on a machine of this speed, with `left_s` for both periods.

    A slower machine gets shorter chats and pages, then smaller bursts and fewer pages, then rarer
    bursts; a faster one the same in less time, then larger bursts and more pages.
    """
    fit = Fit.to_scale(scale_of(speed))
    plan = _pages(_lengths(DemoPlan(scale=scale_of(speed)), fit, left_s), fit)
    alone_s, together_s = wanted.alone_s or plan.alone_s, wanted.together_s or plan.together_s
    plan = replace(plan, alone_s=alone_s, together_s=together_s)
    return _targets(_bursts(plan, fit), speed)


def alone_needs_s(speed: Speed, plan: DemoPlan) -> tuple[float, float]:
    """What a burst's last chat waits for its first token with nothing beside it, and the longest
    time between two tokens: a step with another's prompt in it."""
    prompt_s = (PROMPT_TOKENS + TOKENS_A_WORD * plan.excerpt_words) / speed.prefill_tps
    step_s = speed.step_s(plan.burst_size)
    return plan.burst_size * prompt_s + step_s, prompt_s + step_s


def _pace(fit: Fit) -> float:
    """Of everything that lasts: on a fast machine the demo is over sooner."""
    return min(max(fit.time, FASTEST), 1.0)


def _lengths(plan: DemoPlan, fit: Fit, left_s: float) -> DemoPlan:
    """Of texts and periods. The first period gets a quarter of the time, but not so little that
    nothing could be seen."""
    most_s = _pace(fit) * plan.alone_s
    alone_s = min(most_s, max(left_s / 4, most_s / 3))
    return replace(
        plan,
        alone_s=alone_s,
        together_s=3 * alone_s,
        sample_s=_pace(fit),
        excerpt_words=fit.length(plan.excerpt_words),
        chat_tokens=fit.length(plan.chat_tokens),
        page_words=fit.length(plan.page_words),
        summary_tokens=fit.length(plan.summary_tokens),
    )


def _pages(plan: DemoPlan, fit: Fit) -> DemoPlan:
    """As many as the second period has time for."""
    share = plan.together_s / DemoPlan().together_s / fit.time
    num_documents = max(6, round(share * plan.num_documents))
    in_flight = min(plan.in_flight, max(4, num_documents // 3))
    return replace(plan, num_documents=num_documents, in_flight=in_flight)


def _bursts(plan: DemoPlan, fit: Fit) -> DemoPlan:
    """As busy as at scale 1: a burst of another size comes after another time."""
    usual = DemoPlan()
    size = max(2, round(usual.burst_size * _pace(fit) / fit.time))
    gap_s = usual.alone_s / usual.num_bursts * fit.time * size / usual.burst_size
    return replace(plan, burst_size=size, num_bursts=max(2, round(plan.alone_s / gap_s)))


def _targets(plan: DemoPlan, speed: Speed) -> DemoPlan:
    """The default ones, or on a slower machine what leaves chat alone ROOM."""
    if plan.scale >= 1:
        return plan
    ttft_s, tbt_s = (_two_digits(ROOM * s) for s in alone_needs_s(speed, plan))
    return replace(
        plan,
        ttft_target_s=max(plan.ttft_target_s, ttft_s),
        tbt_target_s=max(plan.tbt_target_s, tbt_s),
    )


def _two_digits(value: float) -> float:
    """The next number of two digits."""
    unit: float = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / unit) * unit, 4)
