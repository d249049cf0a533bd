"""When online requests arrive: seeded processes, and rates or requests replayed from traces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from .fit import Fit
from .lengths import TraceLengths
from .table import Table
from .traces import RatePoint, RequestFormat


class Bursts(Table):
    """`num_requests` in bursts of `burst_size`, one burst at a random moment of each equal slice.

    Within a burst requests arrive evenly over `burst_span_s`.
    """

    kind: Literal["bursts"]
    num_requests: int = Field(ge=1)
    burst_size: int = Field(ge=1)
    burst_span_s: float = Field(default=0.1, ge=0)

    def times(self, rng: Random, duration_s: float) -> list[float]:
        num_bursts = -(-self.num_requests // self.burst_size)
        slice_s = duration_s / num_bursts
        if self.burst_span_s >= slice_s:
            raise ValueError(
                f"burst_span_s {self.burst_span_s} fills the {slice_s:.3g} s a burst has"
            )
        times: list[float] = []
        for burst in range(num_bursts):
            start_s = burst * slice_s + rng.random() * (slice_s - self.burst_span_s)
            size = min(self.burst_size, self.num_requests - len(times))
            times += [start_s + self.burst_span_s * i / self.burst_size for i in range(size)]
        return times

    def fitted(self, fit: Fit) -> Bursts:
        return self.model_copy(
            update={
                "num_requests": fit.count(self.num_requests),
                "burst_span_s": fit.time * self.burst_span_s,
            }
        )


class Opening(Table):
    """`num_requests` at the beginning, one at a random moment of each equal slice of `span_s`.

    On a faster machine they are as many: they are what conversations begin with.
    """

    kind: Literal["opening"]
    num_requests: int = Field(ge=1)
    span_s: float = Field(gt=0)

    def times(self, rng: Random, duration_s: float) -> list[float]:
        if self.span_s > duration_s:
            raise ValueError(
                f"span_s {self.span_s} is longer than the {duration_s:.3g} s there are"
            )
        slice_s = self.span_s / self.num_requests
        return [(i + rng.random()) * slice_s for i in range(self.num_requests)]

    def fitted(self, fit: Fit) -> Opening:
        return self.model_copy(update={"span_s": fit.time * self.span_s})


class Phase(Table):
    seconds: float = Field(gt=0)
    rate_rps: float = Field(ge=0)

    def fitted(self, fit: Fit) -> Phase:
        return Phase(seconds=fit.time * self.seconds, rate_rps=self.rate_rps / fit.time)


class Phases(Table):
    """Poisson arrivals whose rate goes round the given phases: bursts and lulls."""

    kind: Literal["phases"]
    phases: tuple[Phase, ...] = Field(min_length=1)

    def points(self, duration_s: float) -> list[RatePoint]:
        """The rate over so many seconds."""
        points: list[RatePoint] = []
        start_s = 0.0
        for phase in cycle(self.phases):
            if start_s >= duration_s:
                break
            points.append(RatePoint(start_s, phase.rate_rps))
            start_s += phase.seconds
        return points

    def times(self, rng: Random, duration_s: float) -> list[float]:
        return poisson(rng, self.points(duration_s), duration_s)

    def fitted(self, fit: Fit) -> Phases:
        return self.model_copy(update={"phases": tuple(p.fitted(fit) for p in self.phases)})


class Gamma(Table):
    """Gaps from a gamma distribution: mean 1 / rate_rps, coefficient of variation `cv`.

    cv 1 is Poisson; the larger, the burstier.
    """

    kind: Literal["gamma"]
    rate_rps: float = Field(gt=0)
    cv: float = Field(default=1.0, gt=0)

    def times(self, rng: Random, duration_s: float) -> list[float]:
        shape = 1 / self.cv**2
        scale = 1 / (self.rate_rps * shape)
        times: list[float] = []
        # The clock starts at a random point of a gap. One that it met in a process which has run
        # before would be longer: over many seeds cv^2 / 2 more requests come than the rate says.
        now_s = rng.random() * rng.gammavariate(shape, scale)
        while now_s < duration_s:
            times.append(now_s)
            now_s += rng.gammavariate(shape, scale)
        return times

    def fitted(self, fit: Fit) -> Gamma:
        return self.model_copy(update={"rate_rps": self.rate_rps / fit.time})


class Diurnal(Table):
    """Poisson arrivals that follow a rate trace.

    `trace_seconds` of the trace, from `trace_start_s` on, are squeezed into the run, and its rates
    multiplied so that their mean is `rate_rps`.
    """

    kind: Literal["diurnal"]
    trace: str
    rate_rps: float = Field(gt=0)
    trace_start_s: float = Field(default=0.0, ge=0)
    trace_seconds: float = Field(gt=0)

    def fitted(self, fit: Fit) -> Diurnal:
        return self.model_copy(update={"rate_rps": self.rate_rps / fit.time})


class Replay(TraceLengths):
    """The requests of a trace, from a place the seed picks, at the pace and lengths given.

    Time is stretched by one factor so that the whole trace's mean rate becomes `rate_rps`;
    prompts and outputs are multiplied by a factor each so that their means over the whole trace
    become `mean_prompt_tokens` and `mean_output_tokens`, then cut to the two maxima.
    keep_share: of the trace's conversations, those that the seed keeps. Those that are kept are
    whole, and nearer to each other in time, so that a short run has turns of one conversation.
    """

    kind: Literal["replay"]
    format: RequestFormat
    rate_rps: float = Field(gt=0)
    keep_share: float = Field(default=1.0, gt=0, le=1)

    def fitted(self, fit: Fit) -> Replay:
        rate = {"rate_rps": self.rate_rps / fit.time}
        return self.model_copy(update={**self.fitted_lengths(fit), **rate})


Arrivals = Annotated[
    Bursts | Opening | Phases | Gamma | Diurnal | Replay, Field(discriminator="kind")
]


def poisson(rng: Random, points: Sequence[RatePoint], duration_s: float) -> list[float]:
    """Arrivals in [0, duration_s) at a rate that is constant between points.

    Unit-rate arrivals are mapped through the inverse of the expected count (Cinlar's inversion),
    so that equal seeds with a scaled rate keep their order. `points` rise, the first at 0 or
    earlier; the last one's rate holds to the end.
    """
    times: list[float] = []
    expected = 0.0
    next_count = rng.expovariate(1.0)
    ends = [point.start_s for point in points[1:]] + [duration_s]
    for point, end_s in zip(points, ends, strict=True):
        start_s, end_s = max(point.start_s, 0.0), min(end_s, duration_s)
        if end_s <= start_s:
            continue
        count_at_end = expected + point.rate_rps * (end_s - start_s)
        while next_count < count_at_end:
            times.append(start_s + (next_count - expected) / point.rate_rps)
            next_count += rng.expovariate(1.0)
        expected = count_at_end
    return times
