"""How much a replica harvests beside how much online load: measured once, then looked up.

Simulating every step of a thousand replicas over a day is too slow. A replica's offline rate
depends on its online rate, which changes over minutes, while the engine settles within
seconds. So it is measured with the full simulator at a few constant rates, and a fleet over
a day becomes a sum over slots of time: see `conserve.sim.slots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conserve.core.snapshot import Targets
from conserve.metrics import RunSummary, summarise
from conserve.sim.arms import Arm
from conserve.sim.profiles import Profile
from conserve.sim.run import simulate
from conserve.sim.supply import ran_out, with_more
from conserve.workload import Scenario, Window, build_workload

Floats = NDArray[np.float64]

WINDOW = Window(lead_in_s=60.0, duration_s=240.0, drain_s=60.0)
NUM_RATES = 7
IN_FLIGHT_SLOTS = 2
"""Offline requests in flight, as a multiple of the machine's slots: it never waits for one."""
NUM_REQUESTS = 20_000
"""Offline requests of a run, unless it has need of more."""


@dataclass(frozen=True, slots=True)
class HarvestPoint:
    """One replica at one constant online rate. None: no request to measure it on."""

    rate_rps: float
    offline_rps: float
    offline_tps: float
    ttft_p99_s: float | None
    tbt_p99_s: float | None
    slo_attainment: float | None


@dataclass(frozen=True, slots=True)
class HarvestCurve:
    """Points by rising rate, the first at 0. Between them rates are interpolated."""

    points: Sequence[HarvestPoint]
    tokens_per_request: float = 1.0
    """Mean prompt and output of the offline requests it was measured with."""

    def offline_rps(self, rates_rps: Floats) -> Floats:
        """Offline requests a second at each online rate; past the last point, its own."""
        xs = [point.rate_rps for point in self.points]
        return np.interp(rates_rps, xs, [point.offline_rps for point in self.points])

    def slo_attainment(self, rates_rps: Floats) -> Floats:
        """Share of online requests that meet both targets at each online rate."""
        known = [point for point in self.points if point.slo_attainment is not None]
        if not known:
            return np.ones_like(rates_rps)
        xs = [point.rate_rps for point in known]
        return np.interp(rates_rps, xs, [point.slo_attainment or 0.0 for point in known])


def measure(
    profile: Profile,
    arm: Arm,
    targets: Targets,
    online_lengths: Mapping[str, Any],
    offline_lengths: Mapping[str, Any],
    most_rps: float,
    traces: Mapping[str, Path],
    *,
    seed: int = 1,
    num_rates: int = NUM_RATES,
) -> HarvestCurve:
    """Simulate one replica in full at rates from 0 to `most_rps`, Poisson arrivals.

    Lengths are as in a scenario file. Raises ScenarioError, TraceError.
    """
    rates = [most_rps * index / (num_rates - 1) for index in range(num_rates)]
    points, tokens_per_request = [], 1.0
    for rate_rps in rates if most_rps > 0 else [0.0]:
        load = Load(online_lengths, offline_lengths, rate_rps)
        summary, tokens_per_request = at_rate(profile, arm, targets, load, traces, seed=seed)
        points.append(
            HarvestPoint(
                rate_rps,
                # Tokens count as they are made: a steadier rate than that of finished requests.
                summary.offline_tps / tokens_per_request,
                summary.offline_tps,
                summary.ttft_p99_s,
                summary.tbt_p99_s,
                summary.slo_attainment,
            )
        )
    return HarvestCurve(points, tokens_per_request)


@dataclass(frozen=True, slots=True)
class Load:
    """Lengths as in a scenario file, online requests a second, and the coefficient of variation of
    the time between two of them: 1 is chance alone."""

    online_lengths: Mapping[str, Any]
    offline_lengths: Mapping[str, Any]
    rate_rps: float
    cv: float = 1.0


def at_rate(
    profile: Profile,
    arm: Arm,
    targets: Targets,
    load: Load,
    traces: Mapping[str, Path],
    *,
    seed: int,
    window: Window | None = None,
) -> tuple[RunSummary, float]:
    """One replica under a constant load for WINDOW or `window`, and the mean tokens of its offline
    requests, of which there are always some left.

    Raises ScenarioError, TraceError.
    """
    window = window or WINDOW
    scenario = _scenario(profile, targets, load, window)
    while True:
        workload = build_workload(scenario, seed, traces)
        outcome = simulate(workload, arm, profile, targets, window, seed=seed)
        if not ran_out(scenario, outcome.records):
            break
        scenario = with_more(scenario)
    sizes = [p.num_prompt_tokens + p.num_output_tokens for p in workload.offline]
    summary = summarise(outcome.records, window.duration_s, targets)
    return summary, sum(sizes) / len(sizes)


def _scenario(profile: Profile, targets: Targets, load: Load, window: Window) -> Scenario:
    table: dict[str, Any] = {
        "name": "harvest",
        "about": "one replica at a constant online rate",
        "duration_s": window.duration_s,
        "lead_in_s": window.lead_in_s,
        "targets": {"ttft_ms": targets.ttft_s * 1e3, "tbt_ms": targets.tbt_s * 1e3},
        "offline": {
            "in_flight": IN_FLIGHT_SLOTS * profile.machine.max_running,
            "num_requests": NUM_REQUESTS,
            "lengths": load.offline_lengths,
        },
    }
    if load.rate_rps > 0:
        arrivals = {"kind": "gamma", "rate_rps": load.rate_rps, "cv": load.cv}
        table["online"] = {"arrivals": arrivals, "lengths": load.online_lengths}
    return Scenario.of(table, "harvest")
