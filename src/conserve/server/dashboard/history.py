"""What the charts show: one point a second for ten minutes, one each ten seconds for two hours.

Bounded: the two rings hold at most 1,320 points of 16 numbers, whatever the server does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from conserve.server.series import LATENCIES, Change, merge

COLUMNS = (
    "time_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "tbt_p50_s",
    "tbt_p99_s",
    "online_tps",
    "offline_tps",
    "online_rps",
    "offline_rps",
    "kv_online_blocks",
    "kv_offline_blocks",
    "kv_free_blocks",
    "checkpoint_used_ratio",
    "stopped_steps",
    "displaced_requests",
    "restored_tokens",
    "latency_model_error",
)
"""Of a point: when it ends (Unix time), seconds, tokens and requests a second, blocks as they were
at its end, the share in use of the host's pool for checkpoints, counts within the point, and the
latency model's mean relative error."""

Point = tuple[float | None, ...]

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
        self.fine.append(self._point(change, merge(self.recent(COARSE_S))))
        self._open.append(change)
        if sum(one.span_s for one in self._open) >= COARSE_S:
            whole = merge(self._open)
            self.coarse.append(self._point(whole, whole))
            self._open.clear()

    def recent(self, seconds: float = RECENT_S) -> list[Change]:
        """Changes of the last `seconds`, at most RECENT_S; never empty after the first."""
        since = self._recent[-1].time_s - seconds if self._recent else 0.0
        return [change for change in self._recent if change.time_s > since]

    def _point(self, change: Change, around: Change) -> Point:
        values = (
            change.time_s,
            *(around.latency(name).percentile_s(q) for name in LATENCIES for q in (50, 99)),
            change.rate("computed_tokens_total", "online"),
            change.rate("computed_tokens_total", "offline"),
            change.rate("requests_total", "online"),
            change.rate("requests_total", "offline"),
            change.gauge("kv_blocks", "online"),
            change.gauge("kv_blocks", "offline"),
            change.gauge("kv_free_blocks"),
            change.gauge("checkpoint_used_ratio", "memory"),
            change.total("stopped_steps_total"),
            change.total("displaced_requests_total"),
            change.total("restored_tokens_total"),
            change.gauge("latency_model_error_ratio"),
        )
        return tuple(None if value is None else round(value, 4) for value in values)


def columns(points: Iterable[Point]) -> dict[str, list[float | None]]:
    """The points by column, as a chart wants them."""
    rows = list(points)
    return {name: [row[index] for row in rows] for index, name in enumerate(COLUMNS)}
