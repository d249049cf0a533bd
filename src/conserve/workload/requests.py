"""The requests of one run: from a scenario and a seed, always the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path
from random import Random

from .arrivals import Arrivals, Diurnal, Replay, poisson
from .lengths import Empirical, Lengths
from .plan import RequestPlan, Workload
from .scaling import (
    Scale,
    length_factor,
    scaled_length,
    squeezed_rates,
    thinned,
    time_factor,
    window,
)
from .scenario import Offline, Online, Scenario
from .sessions import Sessions
from .table import ScenarioError
from .trace_columns import TokenCounts, TraceRow
from .trace_formats import MOONCAKE_BLOCK_TOKENS
from .traces import read_lengths, read_rates, read_requests


def build_workload(scenario: Scenario, seed: int, traces: Mapping[str, Path]) -> Workload:
    """The requests of one run of a scenario without a sweep (see Scenario.at).

    traces: the path of each name in scenario.trace_names(). Raises ScenarioError, TraceError.
    """
    for name in scenario.trace_names():
        if name not in traces:
            raise ScenarioError(
                f"{scenario.name}: needs the trace {name!r}: give its file with --trace {name}=PATH"
            )
    workload = Workload(in_flight=_in_flight(scenario.offline))
    try:
        if scenario.online:
            _add_online(workload, scenario.online, scenario, seed, traces)
        if scenario.offline:
            _add_offline(workload, scenario.offline, scenario.lead_in_s, seed, traces)
    except ValueError as error:
        if isinstance(error, ScenarioError) or type(error) is not ValueError:
            raise
        raise ScenarioError(f"{scenario.name}: {error}") from error
    return workload


def _in_flight(offline: Offline | None) -> int:
    if offline is None:
        return 0
    return offline.num_requests if offline.in_flight == "all" else offline.in_flight


def _stream(seed: int, what: str) -> Random:
    """A random stream of its own for each use, so that changing one leaves the others alone."""
    return Random(f"{seed}/{what}")  # noqa: S311 - a workload, no secret


def _add_online(
    workload: Workload, online: Online, scenario: Scenario, seed: int, traces: Mapping[str, Path]
) -> None:
    rng, begins_s = _stream(seed, "online arrivals"), 0.0
    if online.in_lead_in:
        begins_s = -scenario.lead_in_s
    span_s = scenario.duration_s - begins_s
    if isinstance(online.arrivals, Replay):
        plans = _replay(workload, online.arrivals, span_s, rng, traces)
    else:
        times = _times(workload, online.arrivals, span_s, rng, traces)
        plans = _fresh(workload, online, times, seed, traces)
    if begins_s:
        plans = [replace(plan, arrival_s=begins_s + plan.arrival_s) for plan in plans]
    workload.online.extend(plans)


def _fresh(
    workload: Workload, online: Online, times: list[float], seed: int, traces: Mapping[str, Path]
) -> list[RequestPlan]:
    """A request, or the first turn of a conversation, for each of `times`."""
    if online.sessions:
        return _opened(workload, online.sessions, times, seed)
    assert online.lengths is not None  # Online checks it
    lengths = _lengths(workload, online.lengths, len(times), _stream(seed, "online"), traces)
    return [
        RequestPlan(f"online-{i}", True, arrival_s, prompt, output)
        for i, (arrival_s, (prompt, output)) in enumerate(zip(times, lengths, strict=True))
    ]


def _opened(
    workload: Workload, sorts: Sequence[Sessions], times: Sequence[float], seed: int
) -> list[RequestPlan]:
    """The first turns of conversations, of the sorts in turn; the others go to `next_turns`."""
    opened = []
    in_turn = cycle([sort for sort in sorts for _ in range(sort.weight)])
    for i, (arrival_s, sort) in enumerate(zip(times, in_turn, strict=False)):
        turns = list(sort.turns(f"online-{i}", arrival_s, _stream(seed, f"session {i}")))
        opened.append(turns[0])
        for before, plan in pairwise(turns):
            workload.next_turns[before.request_id] = plan
    return opened


def _times(
    workload: Workload,
    arrivals: Arrivals,
    duration_s: float,
    rng: Random,
    traces: Mapping[str, Path],
) -> list[float]:
    assert not isinstance(arrivals, Replay)
    if not isinstance(arrivals, Diurnal):
        return arrivals.times(rng, duration_s)
    points = squeezed_rates(
        read_rates(traces[arrivals.trace]),
        arrivals.trace_start_s,
        arrivals.trace_seconds,
        duration_s,
        arrivals.rate_rps,
    )
    workload.scales.append(Scale(arrivals.trace, time=duration_s / arrivals.trace_seconds))
    return poisson(rng, points, duration_s)


def _replay(
    workload: Workload, spec: Replay, duration_s: float, rng: Random, traces: Mapping[str, Path]
) -> list[RequestPlan]:
    rows = read_requests(traces[spec.trace], spec.spelling)
    if spec.keep_share < 1:
        rows = thinned(rows, spec.keep_share, rng)
    scale = _length_scale(spec, rows.tokens, time_factor(rows, spec.rate_rps))
    workload.scales.append(scale)
    block_tokens = max(round((spec.block_tokens or MOONCAKE_BLOCK_TOKENS) * scale.prompt), 1)
    plans = []
    for i, row in enumerate(window(rows, scale.time, duration_s, rng)):
        prompt, output = _scaled(spec, scale, row.num_prompt_tokens, row.num_output_tokens)
        prefix = _blocks(row, block_tokens, prompt)
        plans.append(RequestPlan(f"online-{i}", True, row.arrival_s, prompt, output, prefix))
    return plans


def _length_scale(spec: Replay | Empirical, tokens: TokenCounts, time: float = 1.0) -> Scale:
    return Scale(
        spec.trace,
        time=time,
        prompt=length_factor(tokens.prompt, spec.mean_prompt_tokens),
        output=length_factor(tokens.output, spec.mean_output_tokens),
        num_failed=tokens.num_failed,
    )


def _scaled(spec: Replay | Empirical, scale: Scale, prompt: int, output: int) -> tuple[int, int]:
    return (
        scaled_length(prompt, scale.prompt, spec.max_prompt_tokens),
        scaled_length(output, scale.output, spec.max_output_tokens),
    )


def _blocks(row: TraceRow, size: int, num_prompt_tokens: int) -> tuple[tuple[str, int], ...]:
    """The row's prefix blocks of `size` tokens, as many as the prompt has room for."""
    left = num_prompt_tokens
    blocks = []
    for block_id in row.prefix_ids:
        if left <= 0:
            break
        blocks.append((f"block-{block_id}", min(size, left)))
        left -= size
    return tuple(blocks)


def _lengths(
    workload: Workload, spec: Lengths, count: int, rng: Random, traces: Mapping[str, Path]
) -> list[tuple[int, int]]:
    """(prompt, output) tokens of `count` requests."""
    if not isinstance(spec, Empirical):
        return [(spec.prompt.draw(rng), spec.output.draw(rng)) for _ in range(count)]
    tokens = read_lengths(traces[spec.trace], spec.spelling)
    scale = _length_scale(spec, tokens)
    workload.scales.append(scale)
    drawn = rng.choices(range(len(tokens)), k=count)
    return [_scaled(spec, scale, *tokens.pair(i)) for i in drawn]


def _add_offline(
    workload: Workload, offline: Offline, lead_in_s: float, seed: int, traces: Mapping[str, Path]
) -> None:
    rng = _stream(seed, "offline")
    lengths = _lengths(workload, offline.lengths, offline.num_requests, rng, traces)
    shared = offline.shared_prefix
    for i, (prompt, output) in enumerate(lengths):
        prefix: tuple[tuple[str, int], ...] = ()
        if shared:
            group = rng.randrange(shared.num_prefixes)
            # One token at least is the request's own.
            prefix = ((f"shared-{group}", min(shared.tokens, prompt - 1)),)
        workload.offline.append(
            RequestPlan(f"offline-{i}", False, -lead_in_s, prompt, output, prefix)
        )
