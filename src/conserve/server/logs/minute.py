"""One line a minute of what matters, from the series that /metrics shows."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from conserve.batch.lifecycle import TERMINAL
from conserve.metrics import bucket_percentile

logger = logging.getLogger("vllm.conserve")

PREFIX = "conserve:"
LABELS = ("class", "state", "status")
SAME_ON_ALL = frozenset({"ttft_target_seconds", "tbt_target_seconds"})

Key = tuple[str, str, float]
"""A sample's name without prefix, the value of its own label or '', the bound of a bucket or 0."""


class Registry(Protocol):
    """The part of prometheus_client's registries that is used here."""

    def collect(self) -> Iterable[Any]: ...


def read(registry: Registry) -> dict[Key, float]:
    """Our samples at this moment, summed over the engines."""
    found: dict[Key, float] = {}
    for family in registry.collect():
        if family.name.startswith(PREFIX):
            for sample in family.samples:
                label = next((sample.labels[name] for name in LABELS if name in sample.labels), "")
                name = sample.name.removeprefix(PREFIX)
                key = (name, label, float(sample.labels.get("le", 0.0)))
                before = found.get(key, 0.0)
                found[key] = sample.value if name in SAME_ON_ALL else before + sample.value
    return found


@dataclass(frozen=True, slots=True)
class Minute:
    """What came between two readings `span_s` apart, and what stands at the later one."""

    span_s: float
    before: Mapping[Key, float]
    after: Mapping[Key, float]

    def total(self, name: str, label: str = "", bound: float = 0.0) -> float:
        key = (name, label, bound)
        return max(0.0, self.after.get(key, 0.0) - self.before.get(key, 0.0))

    def now(self, name: str, label: str = "") -> float:
        return self.after.get((name, label, 0.0), 0.0)

    def percentile_s(self, name: str, q: float) -> float | None:
        """Of online requests; None where there were none."""
        sample = f"{name}_seconds_bucket"
        bounds = sorted(le for (n, label, le) in self.after if (n, label) == (sample, "online"))
        upto = [self.total(sample, "online", bound) for bound in bounds]
        counts = [max(0.0, more - less) for less, more in zip([0.0, *upto], upto, strict=False)]
        return bucket_percentile(bounds[:-1], counts, q) if counts else None

    @property
    def num_live_batches(self) -> float:
        return sum(
            value
            for (name, status, _), value in self.after.items()
            if name == "batches" and status not in TERMINAL
        )

    @property
    def is_idle(self) -> bool:
        """Nothing was computed, and nothing waits to be."""
        work = [self.total("computed_tokens_total", label) for label in ("online", "offline")]
        for name in ("running_requests", "waiting_requests"):
            work += [self.now(name, label) for label in ("online", "offline")]
        return not any((*work, self.num_live_batches))


def figures(minute: Minute) -> dict[str, float | None]:
    """What the line says, for JSON; seconds, tokens a second, counts. None is not known."""
    found: dict[str, float | None] = {
        "span_s": minute.span_s,
        "online_first_tokens": minute.total("ttft_seconds_count", "online"),
    }
    for name in ("ttft", "tbt"):
        for q in (50, 99):
            found[f"{name}_p{q}_s"] = minute.percentile_s(name, q)
        found[f"{name}_target_s"] = minute.now(f"{name}_target_seconds") or None
    offline = minute.total("computed_tokens_total", "offline")
    completed, failed, remaining = (
        minute.now("batch_live_lines", state) for state in ("completed", "failed", "remaining")
    )
    found |= {
        "offline_tokens_per_s": offline / minute.span_s,
        "offline_running": minute.now("running_requests", "offline"),
        "offline_waiting": minute.now("waiting_requests", "offline"),
        "stopped_steps": minute.total("stopped_steps_total"),
        "displaced_requests": minute.total("displaced_requests_total"),
        "live_batches": minute.num_live_batches,
        "batch_lines_done": completed + failed,
        "batch_lines": completed + failed + remaining,
        "batches_that_will_miss": minute.now("batch_deadlines", "will_miss"),
    }
    return {name: None if value is None else round(value, 4) for name, value in found.items()}


def words(found: Mapping[str, float | None]) -> str:
    """The line; parts that have nothing to say are left out."""
    parts = []
    if found["online_first_tokens"]:
        late = _latency("first token", found, "ttft") + _latency("gaps", found, "tbt")
        parts.append(f"online: {found['online_first_tokens']:.0f} requests{late}")
    parts.append(
        f"offline: {found['offline_tokens_per_s']:.0f} tokens/s, "
        f"{found['offline_running']:.0f} running, {found['offline_waiting']:.0f} waiting"
    )
    if found["stopped_steps"] or found["displaced_requests"]:
        parts.append(
            f"{found['stopped_steps']:.0f} steps stopped, "
            f"{found['displaced_requests']:.0f} requests displaced"
        )
    if found["live_batches"]:
        text = f"batches: {found['live_batches']:.0f} live, "
        text += f"{found['batch_lines_done']:.0f} of {found['batch_lines']:.0f} lines"
        if late_ones := found["batches_that_will_miss"]:
            text += f", {late_ones:.0f} will miss the deadline"
        parts.append(text)
    return f"Last {found['span_s']:.0f} s: {'; '.join(parts)}"


def _latency(what: str, found: Mapping[str, float | None], name: str) -> str:
    p50, p99, target = (found[f"{name}_{which}_s"] for which in ("p50", "p99", "target"))
    if p50 is None or p99 is None or target is None:
        return ""
    return f", {what} P50 {p50 * 1000:.0f} ms, P99 {p99 * 1000:.0f} ms (target {target * 1000:.0f})"


async def log_each(interval_s: float, registry: Registry) -> None:
    """For ever; silent while the server is idle."""
    before, before_s = read(registry), time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        after, after_s = read(registry), time.monotonic()
        minute = Minute(after_s - before_s, before, after)
        if not minute.is_idle:
            found = figures(minute)
            logger.info("%s", words(found), extra={"conserve": found})
        before, before_s = after, after_s
