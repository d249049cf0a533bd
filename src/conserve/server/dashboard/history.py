"""What the charts show: one point a second for ten minutes, one each ten seconds for two hours.

Bounded: the two rings hold at most 1,320 points of 17 numbers, whatever the server does.
"""

from __future__ import annotations

from collections import deque
from typing import TypeVar

from conserve.server.dashboard.messages import Point
from conserve.server.series import Change, merge

FINE_POINTS = 600
COARSE_POINTS = 720
COARSE_S = 10.0
"""Seconds in a point of the coarse ring, and seconds back that the percentiles of a fine one see:
a second alone has too few requests to have a P99."""
RECENT_S = 60.0


class History:
    """Filled by `add`, once for each change, in order."""

    def __init__(self) -> None:
        self.fine: deque[Point] = deque(maxlen=FINE_POINTS)
        self.coarse: deque[Point] = deque(maxlen=COARSE_POINTS)
        self._recent: deque[Change] = deque()
        self._open: list[Change] = []

    def add(self, change: Change) -> None:
        self._recent.append(change)
        while change.time_s - self._recent[0].time_s >= RECENT_S:
            self._recent.popleft()
        self.fine.append(_point(change, merge(self.recent(COARSE_S))))
        self._open.append(change)
        if sum(one.span_s for one in self._open) >= COARSE_S:
            whole = merge(self._open)
            self.coarse.append(_point(whole, whole))
            self._open.clear()

    def recent(self, seconds: float = RECENT_S) -> list[Change]:
        """Changes of the last `seconds`, at most RECENT_S; never empty after the first."""
        since = self._recent[-1].time_s - seconds if self._recent else 0.0
        return [change for change in self._recent if change.time_s > since]


def _point(change: Change, around: Change) -> Point:
    """Latencies are those of `around`."""
    ttft, tbt = around.latency("ttft_seconds"), around.latency("tbt_seconds")
    return Point(
        time_s=_short(change.time_s),
        ttft_p50_s=_short(ttft.percentile_s(50)),
        ttft_p99_s=_short(ttft.percentile_s(99)),
        tbt_p50_s=_short(tbt.percentile_s(50)),
        tbt_p99_s=_short(tbt.percentile_s(99)),
        online_tps=_short(change.rate("computed_tokens_total", "online")),
        offline_tps=_short(change.rate("computed_tokens_total", "offline")),
        online_rps=_short(change.rate("requests_total", "online")),
        offline_rps=_short(change.rate("requests_total", "offline")),
        kv_online_blocks=_short(change.gauge("kv_blocks", "online")),
        kv_offline_blocks=_short(change.gauge("kv_blocks", "offline")),
        kv_free_blocks=_short(change.gauge("kv_free_blocks")),
        checkpoint_used_ratio=_short(change.gauge("checkpoint_used_ratio", "memory")),
        stopped_steps=_short(change.total("stopped_steps_total")),
        displaced_requests=_short(change.total("displaced_requests_total")),
        restored_tokens=_short(change.total("restored_tokens_total")),
        latency_model_error=_short(change.gauge("latency_model_error_ratio")),
    )


Figure = TypeVar("Figure", float, float | None)


def _short(figure: Figure) -> Figure:
    """With four digits after the point: two hours of them go to everybody who comes to watch."""
    return figure if figure is None else round(figure, 4)
