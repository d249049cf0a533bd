"""When online requests that wait stop the step that runs, and how large such steps are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from conserve.core.latency import LatencyModel, StepShape
from conserve.core.settings import PolicySettings
from conserve.core.snapshot import RunningByClass, Snapshot

RESPONSE_SHARE = 0.25
"""Most of a step's time that it goes on for after it was asked to stop: engines look at least
four times."""


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A stoppable step that runs, as it was planned. Times in seconds."""

    begins_s: float
    predicted_s: float
    online_shape: StepShape = field(default_factory=StepShape)
    """Its online decodes: the step after a stop computes them again."""
    due_s: float = math.inf
    """When the first of them is due its token."""
    forced_tokens: float = math.inf
    """Of the arrivals' prompts, what the step after a stop computes though a token is due; the
    rest is cut off it if it must."""


class Arrival(NamedTuple):
    """An online request that came while the step ran."""

    arrival_s: float
    num_tokens: int
    """Of its prompt."""
    ttft_target_s: float


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Those that wait for it, together."""

    due_s: float
    """When the first of them is due its first token."""
    num_tokens: int
    ttft_target_s: float
    """The shortest of their targets."""

    @classmethod
    def of(cls, arrivals: Sequence[Arrival]) -> Arrivals:
        """There must be one."""
        return cls(
            due_s=min(one.arrival_s + one.ttft_target_s for one in arrivals),
            num_tokens=sum(one.num_tokens for one in arrivals),
            ttft_target_s=min(one.ttft_target_s for one in arrivals),
        )


def stop_at_s(
    step: RunningStep,
    arrivals: Arrivals,
    model: LatencyModel,
    *,
    now_s: float,
    patience: float,
) -> float:
    """When to stop a stoppable step for online requests that wait, unless it ends or somebody else
    comes before: `now_s` if at once, else a later moment.

    At once if what remains of the step is more than `patience` (a share of the TTFT target), or if
    remainder + next step would miss the target and the remainder is more than the model's error.
    The paper stops in the second case only, which is `patience` = 1; 0 stops at every arrival.

    A step that has outrun its prediction is expected to go on for as long again as it has outrun
    it: the same two rules then hold from a known moment on.

    A step with online decodes is left alone unless they would still be in time after a stop
    (`time_to_resume_s`), or once it has outrun its prediction by longer than that: stopping it then
    only brings their tokens sooner.
    """
    next_s = next_step_s(model, step.online_shape, arrivals.num_tokens)
    num_forced = min(arrivals.num_tokens, step.forced_tokens)
    forced_s = next_step_s(model, step.online_shape, int(num_forced))
    resume_s = time_to_resume_s(model, step.predicted_s, forced_s)
    end_s, patience_s = step.begins_s + step.predicted_s, patience * arrivals.ttft_target_s
    error_s = model.margin * step.predicted_s
    latest_end_s = arrivals.due_s - next_s
    remaining_s = end_s - now_s
    too_long = remaining_s > patience_s or (end_s > latest_end_s and remaining_s > error_s)
    if too_long and now_s + resume_s <= step.due_s:
        return now_s
    # At end_s + x, another x remains: it ends at end_s + 2 * x.
    overrun_s = min(patience_s, max(error_s, (latest_end_s - end_s) / 2))
    stop_s = max(now_s, end_s + overrun_s)
    if stop_s + resume_s > step.due_s:
        stop_s = max(stop_s, end_s + resume_s)
    return stop_s


def next_step_s(model: LatencyModel, online_shape: StepShape, num_arrived_tokens: int) -> float:
    """Predicted time of the step after a stop: the stopped one's online part and the prompts."""
    shape = replace(online_shape)
    shape.add_prefill(num_arrived_tokens, 0)
    return model.predict_s(shape)


def time_to_resume_s(model: LatencyModel, stopped_s: float, next_s: float) -> float:
    """Seconds from asking a step of `stopped_s` to stop until the one after it (`next_s`, both
    predicted) has given its tokens, with the model's margin."""
    return stopped_s * RESPONSE_SHARE + next_s * (1 + model.margin)


def expected_harvest_rate(num_tokens: float, step_s: float, interruption_rate: float) -> float:
    """Tokens a second of repeated steps that Poisson arrivals stop, losing what they did.

    Renewal reward: n * P(no arrival in T) over E[min(T, arrival)]
    = n * r * exp(-r T) / (1 - exp(-r T)) = n * r / (exp(r T) - 1); n / T as r -> 0.
    """
    exposure = interruption_rate * step_s
    if exposure < 1e-9:
        return num_tokens / step_s if step_s > 0 else 0.0
    if exposure > 50:
        return 0.0
    return num_tokens * interruption_rate / math.expm1(exposure)


def best_step_tokens(
    predict_s: Callable[[int], float],
    interruption_rate: float,
    least: int,
    most: int,
    knee: float = 0.0,
) -> int:
    """Step size in tokens, between `least` and `most`, that harvests most; ties take the smaller.

    `predict_s(n)` is the time of an offline step of n tokens. The rate has one maximum for
    the convex step times of a latency model; sizes a factor sqrt(2) apart, and the model's knee,
    where the rate has a corner, find it within a few per cent of harvest. `least` is taken as 1
    where it is smaller.
    """
    least = max(1, least)
    if most <= least:
        return most
    best, best_rate = least, -1.0
    for tokens in sorted({*_sizes(least, most), min(most, max(least, int(knee)))}):
        rate = expected_harvest_rate(tokens, predict_s(tokens), interruption_rate)
        if rate > best_rate * (1 + 1e-9):
            best, best_rate = tokens, rate
    return best


def _sizes(least: int, most: int) -> Iterator[int]:
    size = float(least)
    while size < most:
        yield round(size)
        size *= math.sqrt(2)
    yield most


def best_offline_tokens(
    running: RunningByClass,
    model: LatencyModel,
    interruption_rate: float,
    least: int,
    most: int,
    beside: int = 0,
) -> int:
    """`best_step_tokens` of a step that has every offline decode, and prompts behind them, with
    what each of those decodes takes `beside` its tokens."""
    decodes = running.offline_decodes
    num_decodes = len(decodes)
    context = max((r.num_computed_tokens for r in running.offline_prefills), default=0)
    decode_context = sum(r.num_computed_tokens for r in decodes)
    decode_tokens = sum(r.num_tokens - r.num_computed_tokens for r in decodes)

    def predict_s(num_tokens: int) -> float:
        chunk = max(0, num_tokens - decode_tokens)
        pairs = chunk * (context + chunk / 2)
        return model.predict_s(StepShape(num_tokens, pairs, num_decodes, decode_context))

    least = min(most, max(decode_tokens, least))
    best = best_step_tokens(predict_s, interruption_rate, least, most, model.knee)
    return min(most, best + beside * num_decodes)


def worth_the_gap(
    snapshot: Snapshot, model: LatencyModel, settings: PolicySettings, shape: StepShape
) -> bool:
    """Whether the step is long beside what the device stands idle behind it if it can be
    stopped, or too long for one that cannot be."""
    if not snapshot.stop_gap_s:
        return True
    predicted_s = model.predict_s(shape)
    longest_s = snapshot.targets.ttft_s * settings.unstoppable_share
    if predicted_s * (1 + model.margin) > longest_s:
        return True
    return snapshot.stop_gap_s <= predicted_s * settings.stop_gap_share
