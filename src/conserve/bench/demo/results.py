"""The demo's figures: one table, and the files it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from conserve.bench.demo.client import DemoError, Seen
from conserve.bench.demo.conditions import Conditions
from conserve.metrics.percentiles import percentile
from conserve.metrics.processors import CpuTimes
from conserve.metrics.records import write_records
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


def write_results(
    folder: Path, seen: Seen, periods: tuple[Period, Period], conditions: Conditions
) -> Results:
    """Write summaries, records, figures and picture into `folder`."""
    from conserve.bench.demo.picture import draw  # matplotlib takes a second to import

    alone, together = (figures(seen, period) for period in periods)
    files = folder / "summaries.jsonl", folder / "demo.png"
    results = Results(alone, together, conditions, *files)
    lines = [json.dumps(asdict(summary), ensure_ascii=False) for summary in seen.summaries]
    results.summaries.write_text("".join(f"{line}\n" for line in lines))
    write_records(folder / "requests.jsonl", seen.records)
    told = {**conditions.as_json(), "alone": asdict(alone), "together": asdict(together)}
    (folder / "figures.json").write_text(json.dumps(told, indent=2) + "\n")
    draw(results, seen, periods)
    return results


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


ROWS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("first token, median", lambda f: _ms(f.ttft_p50_s)),
    ("first token, 99th percentile", lambda f: _ms(f.ttft_p99_s)),
    ("between tokens, median", lambda f: _ms(f.tbt_p50_s)),
    ("between tokens, 99th percentile", lambda f: _ms(f.tbt_p99_s)),
    ("chats", lambda f: f"{f.num_chats} in {f.seconds:.0f} s"),
    ("summaries written", lambda f: str(f.num_summaries)),
    ("chat tokens a second", lambda f: f"{f.chat_tps:,.0f}"),
    ("offline tokens a second", lambda f: f"{f.offline_tps:,.0f}"),
    ("all tokens a second", lambda f: f"{f.total_tps:,.0f}"),
)
DISTURBED_STYLE = "bold red"
SECTIONS_AFTER = (3, 5)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"


def table(results: Results) -> Table:
    """The figures side by side; tokens are prompt and output tokens together."""
    alone, together = results.alone, results.together
    ratio = together.total_tps / alone.total_tps
    caption = Text(f"{ratio:.1f} times the tokens from the same machine", "bold green")
    caption.append(f"\n{results.conditions.scale_in_words()}", "not bold default")
    if disturbance := results.conditions.disturbance():
        caption.append(f"\n{disturbance}", DISTURBED_STYLE)
    shown = Table(
        title="The same bursts of chat, without and with offline work",
        caption=caption,
        title_style="bold",
    )
    shown.add_column("")
    shown.add_column(alone.name, justify="right")
    shown.add_column(together.name, justify="right", style="bold")
    for index, (name, value) in enumerate(ROWS):
        last = index in SECTIONS_AFTER
        shown.add_row(name, value(alone), value(together), end_section=last)
    return shown
