"""What the demo shows while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from conserve.bench.demo.client import Sample, Seen
from conserve.bench.demo.conditions import Conditions
from conserve.metrics.percentiles import percentile

REFRESH_S = 0.5
HISTORY = 44
BARS = " ▁▂▃▄▅▆▇█"
ONLINE, OFFLINE = "dodger_blue1", "orange1"


class Screen:
    """Live progress on a terminal; one line a phase elsewhere."""

    def __init__(self, seen: Seen, console: Console | None = None) -> None:
        self._seen = seen
        self._num_documents = 0
        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=True, refresh_per_second=4)
        self._phase = ""
        self._span = (0.0, 0.0)

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.update("", refresh=True)
            self._live.stop()

    def phase(self, name: str, start_s: float = 0.0, end_s: float = 0.0) -> None:
        """Say what goes on from here; the span, if it has one, becomes a bar."""
        self._phase = name
        self._span = (start_s, end_s)
        if self._console.is_terminal:
            self._live.update(self._picture(start_s))
        else:
            self._console.print(f"demo: {name}", soft_wrap=True)

    def fit(self, conditions: Conditions) -> None:
        """Say what the machine gets; it stays to be read."""
        self._num_documents = conditions.plan.num_documents
        for text in (conditions.scale_in_words(), conditions.fitting_in_words()):
            self._console.print(f"demo: {text}", soft_wrap=True, highlight=False)

    async def keep_fresh(self, now_s: Callable[[], float]) -> None:
        """Redraw until cancelled."""
        while True:
            if self._console.is_terminal:
                self._live.update(self._picture(now_s()))
            await asyncio.sleep(REFRESH_S)

    def _picture(self, now_s: float) -> RenderableType:
        start_s, end_s = self._span
        if end_s <= start_s:
            return Spinner("dots", text=f" {self._phase}")
        return Panel(
            Group(self._bars(now_s), Text(), self._flow(), Text(), self._latency(start_s)),
            title=f"[bold]{self._phase}",
            width=78,
        )

    def _bars(self, now_s: float) -> Table:
        start_s, end_s = self._span
        bars = Table.grid(padding=(0, 1))
        elapsed, total = min(now_s, end_s) - start_s, end_s - start_s
        bars.add_row("time", _bar(elapsed, total), f"{elapsed:.0f} of at most {total:.0f} s")
        done = len(self._seen.summaries)
        bars.add_row(
            "summaries", _bar(done, self._num_documents), f"{done} of {self._num_documents}"
        )
        return bars

    def _flow(self) -> Table:
        """Tokens a second of each class, one character a sample."""
        online, offline = rates(self._seen.samples[-HISTORY - 1 :])
        top = max((a + b for a, b in zip(online, offline, strict=True)), default=0.0)
        flow = Table.grid(padding=(0, 1))
        for name, values, colour in (("chat", online, ONLINE), ("offline", offline, OFFLINE)):
            now = f"{values[-1]:,.0f} tokens/s" if values else ""
            flow.add_row(f"{name:9}", Text(sparkline(values, top), style=colour), now)
        return flow

    def _latency(self, start_s: float) -> RenderableType:
        online = [r for r in self._seen.records if r.online and r.arrival_s >= start_s]
        ttfts = [r.ttft_s for r in online if r.ttft_s is not None]
        tbts = [gap for r in online for gap in r.tbts_s]
        if not ttfts or not tbts:
            return Text("no chat yet", style="dim")
        rows = Table.grid(padding=(0, 2))
        for name, values in (("first token", ttfts), ("between tokens", tbts)):
            p50, p99 = (1000 * (percentile(values, q) or 0) for q in (50, 99))
            rows.add_row(name, f"median {p50:,.0f} ms", f"99th percentile {p99:,.0f} ms")
        return rows


def _bar(done: float, total: float) -> ProgressBar:
    return ProgressBar(total=total, completed=done, width=40)


def rates(samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """Tokens a second between neighbouring samples: online, offline."""
    online: list[float] = []
    offline: list[float] = []
    for earlier, later in pairwise(samples):
        span_s = later.at_s - earlier.at_s
        online.append((later.online_tokens - earlier.online_tokens) / span_s)
        offline.append((later.offline_tokens - earlier.offline_tokens) / span_s)
    return online, offline


def sparkline(values: Sequence[float], top: float) -> str:
    """One character a value, its height a share of `top`."""
    if top <= 0:
        return BARS[0] * len(values)
    return "".join(BARS[round(min(max(v / top, 0.0), 1.0) * (len(BARS) - 1))] for v in values)
