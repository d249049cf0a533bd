"""What the demo measured: the figures of each period."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conserve.bench.demo.client import DemoError, Seen
from conserve.bench.demo.conditions import Conditions
from conserve.metrics.percentiles import percentile
from conserve.metrics.processors import CpuTimes
from conserve.metrics.summary import throughput


@dataclass(frozen=True, slots=True)
class Period:
    """A span of the demo's clock, in seconds; cpu_times: as they stood at its two ends."""

    name: str
    start_s: float
    end_s: float
    cpu_times: tuple[CpuTimes | None, CpuTimes | None] = (None, None)


@dataclass(frozen=True, slots=True)
class Figures:
    """One period. Latencies: online requests that arrived in it; rates: tokens in it, a second."""

    name: str
    seconds: float
    num_chats: int
    num_chats_failed: int
    ttft_p50_s: float
    ttft_p99_s: float
    tbt_p50_s: float
    tbt_p99_s: float
    chat_tps: float
    offline_tps: float
    num_summaries: int

    @property
    def total_tps(self) -> float:
        return self.chat_tps + self.offline_tps


@dataclass(frozen=True, slots=True)
class Results:
    """Both periods, what they ran under, and where the files are."""

    alone: Figures
    together: Figures
    conditions: Conditions
    summaries: Path
    picture: Path


def figures(seen: Seen, period: Period) -> Figures:
    """What one period gave. Raises DemoError when no chat was answered in it."""
    online = [r for r in seen.records if r.online and _within(period, r.arrival_s)]
    offline = [r for r in seen.records if not r.online]
    ttfts = [r.ttft_s for r in online if r.ttft_s is not None]
    tbts = [gap for r in online for gap in r.tbts_s]
    if not (ttfts and tbts):
        errors = {r.error for r in online if r.failed}
        raise DemoError(f"no chat was answered: {next(iter(errors), 'none came')}")
    rates = [throughput(group, period.start_s, period.end_s) for group in (online, offline)]
    chat_tps, offline_tps = (rate.prompt_tps + rate.output_tps for rate in rates)
    return Figures(
        name=period.name,
        seconds=period.end_s - period.start_s,
        num_chats=len(online),
        num_chats_failed=sum(r.failed for r in online),
        ttft_p50_s=percentile(ttfts, 50) or 0.0,
        ttft_p99_s=percentile(ttfts, 99) or 0.0,
        tbt_p50_s=percentile(tbts, 50) or 0.0,
        tbt_p99_s=percentile(tbts, 99) or 0.0,
        chat_tps=chat_tps,
        offline_tps=offline_tps,
        num_summaries=sum(_within(period, s.finished_s) for s in seen.summaries),
    )


def _within(period: Period, at_s: float) -> bool:
    return period.start_s <= at_s <= period.end_s
