"""One run in figures: latency of the online class, throughput of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conserve.core.snapshot import Targets

from .percentiles import percentile
from .records import RequestRecord
from .targets import goodput_rps, slo_attainment, tbt_attainment, ttft_attainment


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Figures of one run over its window [0, duration_s). None: nothing to measure it on.

    Latencies are in seconds and over every online request that arrived in the window, until its
    last token; one that got no token has none, and shows in the shares that met their targets.
    Throughputs are a second of the window, whenever the request was sent: an output token counts
    when it reaches the client, a prompt when its first output token does (its prefill is then
    done), a request when its last token does. Hit ratios are of prompt tokens, over requests of
    the class that were sent in the window and whose server said how many it had cached.
    """

    num_online: int
    num_online_failed: int
    num_offline_finished: int
    num_offline_failed: int
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    tbt_mean_s: float | None
    tbt_p50_s: float | None
    tbt_p90_s: float | None
    tbt_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    slo_attainment: float | None
    ttft_attainment: float | None
    tbt_attainment: float | None
    goodput_rps: float | None
    online_prompt_tps: float
    online_output_tps: float
    offline_rps: float
    offline_prompt_tps: float
    offline_output_tps: float
    offline_tps: float
    total_tps: float
    online_hit_ratio: float | None
    offline_hit_ratio: float | None


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens a second (prompt and output) and finished requests a second, over one window."""

    prompt_tps: float
    output_tps: float
    finished_rps: float


def throughput(records: Sequence[RequestRecord], start_s: float, end_s: float) -> Throughput:
    """What `records` got in [start_s, end_s); see RunSummary for what counts when."""
    if not end_s > start_s:
        raise ValueError(f"the window must end after it starts, not [{start_s}, {end_s})")
    prompt = output = finished = 0
    for record in records:
        times = record.token_times_s
        if not times:
            continue
        output += sum(start_s <= t < end_s for t in times)
        prompt += record.num_prompt_tokens if start_s <= times[0] < end_s else 0
        finished += record.finished and start_s <= times[-1] < end_s
    span = end_s - start_s
    return Throughput(prompt / span, output / span, finished / span)


def summarise(records: Sequence[RequestRecord], duration_s: float, targets: Targets) -> RunSummary:
    """The figures of one run whose window is [0, duration_s)."""
    online = [r for r in records if r.online and 0 <= r.arrival_s < duration_s]
    offline = [r for r in records if not r.online]
    ttfts = [r.ttft_s for r in online if r.ttft_s is not None]
    tbts = [gap for r in online for gap in r.tbts_s]
    tpots = [r.tpot_s for r in online if r.tpot_s is not None]
    everybody_online = [r for r in records if r.online]
    on, off = throughput(everybody_online, 0, duration_s), throughput(offline, 0, duration_s)
    return RunSummary(
        num_online=len(online),
        num_online_failed=sum(r.failed for r in online),
        num_offline_finished=round(off.finished_rps * duration_s),
        num_offline_failed=sum(r.failed for r in offline),
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p90_s=percentile(ttfts, 90),
        ttft_p99_s=percentile(ttfts, 99),
        tbt_mean_s=sum(tbts) / len(tbts) if tbts else None,
        tbt_p50_s=percentile(tbts, 50),
        tbt_p90_s=percentile(tbts, 90),
        tbt_p99_s=percentile(tbts, 99),
        tpot_p50_s=percentile(tpots, 50),
        tpot_p99_s=percentile(tpots, 99),
        slo_attainment=slo_attainment(online, targets),
        ttft_attainment=ttft_attainment(online, targets),
        tbt_attainment=tbt_attainment(online, targets),
        goodput_rps=goodput_rps(online, targets, duration_s),
        online_prompt_tps=on.prompt_tps,
        online_output_tps=on.output_tps,
        offline_rps=off.finished_rps,
        offline_prompt_tps=off.prompt_tps,
        offline_output_tps=off.output_tps,
        offline_tps=off.prompt_tps + off.output_tps,
        total_tps=on.prompt_tps + on.output_tps + off.prompt_tps + off.output_tps,
        online_hit_ratio=hit_ratio(online),
        offline_hit_ratio=hit_ratio([r for r in offline if 0 <= r.arrival_s < duration_s]),
    )


def hit_ratio(records: Sequence[RequestRecord]) -> float | None:
    """Share of prompt tokens that were cached; None where no server said so."""
    told = [r for r in records if r.num_cached_tokens is not None]
    asked = sum(r.num_prompt_tokens for r in told)
    return sum(r.num_cached_tokens or 0 for r in told) / asked if asked else None
