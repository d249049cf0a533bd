"""One line a minute of what matters, from the series that /metrics shows."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

from conserve.batch.lifecycle import LIVE
from conserve.batch.outage import Outage
from conserve.server.series import CLASSES, Change, change, narrowed, read

logger = logging.getLogger("vllm.conserve")


@dataclass(frozen=True, slots=True)
class Minute:
    """What the line says: seconds, tokens a second, counts. None is not known.

    Totals are of the minute (`span_s` long), what runs, waits and lives is as it stands at its end.
    """

    span_s: float
    online_first_tokens: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    ttft_target_s: float | None
    tbt_p50_s: float | None
    tbt_p99_s: float | None
    tbt_target_s: float | None
    offline_tokens_per_s: float
    offline_running: float
    offline_waiting: float
    stopped_steps: float
    displaced_requests: float
    live_batches: float
    batch_lines_done: float
    batch_lines: float
    batches_that_will_miss: float


def minute_of(came: Change) -> Minute:
    def now(name: str, label: str = "") -> float:
        return came.gauge(name, label) or 0.0

    def percentile_s(name: str, q: float) -> float | None:
        found = came.latency(name).percentile_s(q)
        return None if found is None else round(found, 4)

    done = now("batch_live_lines", "completed") + now("batch_live_lines", "failed")
    left = now("batch_live_lines", "remaining") + now("batch_live_lines", "paused")
    return Minute(
        span_s=round(came.span_s, 4),
        online_first_tokens=came.latency("ttft_seconds").num_observed,
        ttft_p50_s=percentile_s("ttft_seconds", 50),
        ttft_p99_s=percentile_s("ttft_seconds", 99),
        ttft_target_s=now("ttft_target_seconds") or None,
        tbt_p50_s=percentile_s("tbt_seconds", 50),
        tbt_p99_s=percentile_s("tbt_seconds", 99),
        tbt_target_s=now("tbt_target_seconds") or None,
        offline_tokens_per_s=round(came.rate("computed_tokens_total", "offline"), 4),
        offline_running=now("running_requests", "offline"),
        offline_waiting=now("waiting_requests", "offline"),
        stopped_steps=came.total("stopped_steps_total"),
        displaced_requests=came.total("displaced_requests_total"),
        live_batches=num_live_batches(came),
        batch_lines_done=done,
        batch_lines=done + left,
        batches_that_will_miss=now("batch_deadlines", "will_miss"),
    )


def num_live_batches(came: Change) -> float:
    return sum(came.gauge("batches", status) or 0.0 for status in LIVE)


def is_idle(came: Change) -> bool:
    """Nothing was computed, and nothing waits to be."""
    computed = [came.total("computed_tokens_total", label) for label in CLASSES]
    held = [
        came.gauge(name, label)
        for name in ("running_requests", "waiting_requests")
        for label in CLASSES
    ]
    return not any((*computed, *held, num_live_batches(came)))


def words(minute: Minute) -> str:
    """The line; parts that have nothing to say are left out."""
    parts = []
    if minute.online_first_tokens:
        first = _latency("first token", minute.ttft_p50_s, minute.ttft_p99_s, minute.ttft_target_s)
        gaps = _latency("gaps", minute.tbt_p50_s, minute.tbt_p99_s, minute.tbt_target_s)
        parts.append(f"online: {minute.online_first_tokens} requests{first}{gaps}")
    parts.append(
        f"offline: {minute.offline_tokens_per_s:.0f} tokens/s, "
        f"{minute.offline_running:.0f} running, {minute.offline_waiting:.0f} waiting"
    )
    if minute.stopped_steps or minute.displaced_requests:
        parts.append(
            f"{minute.stopped_steps:.0f} steps stopped, "
            f"{minute.displaced_requests:.0f} requests displaced"
        )
    if minute.live_batches:
        text = f"batches: {minute.live_batches:.0f} live, "
        text += f"{minute.batch_lines_done:.0f} of {minute.batch_lines:.0f} lines"
        if late_ones := minute.batches_that_will_miss:
            text += f", {late_ones:.0f} will miss the deadline"
        parts.append(text)
    return f"Last {minute.span_s:.0f} s: {'; '.join(parts)}"


def _latency(what: str, p50_s: float | None, p99_s: float | None, target_s: float | None) -> str:
    if p50_s is None or p99_s is None or target_s is None:
        return ""
    target = f"target {target_s * 1000:.0f}"
    return f", {what} P50 {p50_s * 1000:.0f} ms, P99 {p99_s * 1000:.0f} ms ({target})"


async def log_each(interval_s: float, registry: Any) -> None:
    """For ever; silent while the server is idle."""
    series = narrowed(registry)
    before = read(series, time.monotonic())
    outage = Outage(logger, "the minute is left out of the log")
    while True:
        await asyncio.sleep(interval_s)
        with outage.survived():
            after = read(series, time.monotonic())
            came = change(before, after)
            before = after
            if not is_idle(came):
                minute = minute_of(came)
                logger.info("%s", words(minute), extra={"conserve": asdict(minute)})
