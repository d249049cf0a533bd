"""What the server's Prometheus series say at one moment, and what changed between two.

The live page and the log's line a minute read them here, so that they say what /metrics says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from conserve.metrics import bucket_percentile, share_within

Key = tuple[str, str]
"""Name of a series without its prefix, and the value of its own label or ''."""

PREFIX = "conserve:"
LABELS = ("class", "tier", "state", "status")
"""Of which a series that is read here has one at most, beside model and engine."""
CLASSES = ("online", "offline")
LATENCIES = ("ttft_seconds", "tbt_seconds")
TOTALS = (
    "requests_total",
    "computed_tokens_total",
    "recomputed_tokens_total",
    "output_tokens_total",
    "dropped_tokens_total",
    "stopped_steps_total",
    "displaced_requests_total",
    "displaced_tokens_total",
    "displaced_covered_tokens_total",
    "restored_tokens_total",
    "prompt_tokens_total",
    "prefix_hit_tokens_total",
    "chat_seconds_total",
    "chat_alone_seconds_total",
    "bound_tokens_total",
    "stop_response_seconds_sum",
    "stop_response_seconds_count",
)
GAUGES = (
    "kv_blocks",
    "kv_free_blocks",
    "history_blocks",
    "running_requests",
    "waiting_requests",
    "latency_model_error_ratio",
    "checkpoint_used_ratio",
    "ttft_target_seconds",
    "tbt_target_seconds",
    "oldest_offline_wait_seconds",
    "batch_oldest_wait_seconds",
    "batches",
    "batch_deadlines",
    "batch_live_lines",
)
NOT_ADDED = ("_ratio", "_target_seconds", "_wait_seconds")
"""Ends of the names of gauges that engines do not add up to: the highest stands for all."""

NAMES = [
    *(f"{PREFIX}{name}" for name in (*TOTALS, *GAUGES)),
    *(f"{PREFIX}{name}_bucket" for name in LATENCIES),
]


class Registry(Protocol):
    """The part of prometheus_client's registries that is used here."""

    def collect(self) -> Iterable[Any]: ...


def narrowed(registry: Any) -> Registry:
    """The part of `registry` that is read here, since collecting takes time with its series.

    What several processes share through files is collected whole: it has no names to choose by.
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        return registry  # type: ignore[no-any-return]
    return registry.restricted_registry(NAMES)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Reading:
    """Sums over the engines.

    values: totals since the start, and gauges as they are.
    buckets: observations up to each bound, by bound, of online requests.
    """

    time_s: float
    values: dict[Key, float]
    buckets: dict[str, dict[float, float]]

    def get(self, name: str, label: str = "") -> float | None:
        """None where the server has no such series (yet)."""
        return self.values.get((name, label))


def read(registry: Registry, time_s: float) -> Reading:
    reading = Reading(time_s, {}, {})
    wanted = set(NAMES)
    for family in registry.collect():
        if not family.name.startswith(PREFIX):
            continue
        for sample in family.samples:
            if sample.name in wanted:
                _take(reading, sample.name.removeprefix(PREFIX), sample.labels, sample.value)
    return reading


def _take(reading: Reading, name: str, labels: Mapping[str, str], value: float) -> None:
    label = next((labels[each] for each in LABELS if each in labels), "")
    if name.endswith("_bucket"):
        if label == "online":
            bounds = reading.buckets.setdefault(name.removesuffix("_bucket"), {})
            bound = float(labels["le"])
            bounds[bound] = bounds.get(bound, 0.0) + value
        return
    before = reading.values.get((name, label), 0.0)
    reading.values[name, label] = max(before, value) if name.endswith(NOT_ADDED) else before + value


@dataclass(frozen=True, slots=True)
class Latencies:
    """Observations by bucket.

    bounds: the finite bounds, rising.
    counts: observations in each bucket, and last those above every bound.
    """

    bounds: tuple[float, ...] = ()
    counts: tuple[float, ...] = (0.0,)

    @property
    def num_observed(self) -> int:
        return round(sum(self.counts))

    def percentile_s(self, q: float) -> float | None:
        """None where nothing was observed."""
        return bucket_percentile(self.bounds, self.counts, q) if self.bounds else None

    def share_within(self, limit_s: float) -> float | None:
        """None where nothing was observed."""
        return share_within(self.bounds, self.counts, limit_s) if self.bounds else None

    def plus(self, other: Latencies) -> Latencies:
        """Both together; to be asked of two with the same bounds."""
        sums = (a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Latencies(self.bounds, tuple(sums))


@dataclass(frozen=True, slots=True)
class Change:
    """What came between two readings that are `span_s` apart, and the gauges at its end, which is
    `time_s`. Latencies are those of online requests."""

    time_s: float
    span_s: float
    totals: dict[Key, float]
    gauges: dict[Key, float]
    latencies: dict[str, Latencies]

    def total(self, name: str, label: str = "") -> float:
        return self.totals.get((name, label), 0.0)

    def rate(self, name: str, label: str = "") -> float:
        """A second."""
        return self.total(name, label) / self.span_s if self.span_s else 0.0

    def gauge(self, name: str, label: str = "") -> float | None:
        return self.gauges.get((name, label))

    def latency(self, name: str) -> Latencies:
        return self.latencies.get(name, Latencies())


def change(before: Reading, after: Reading) -> Change:
    gauges = {key: value for key, value in after.values.items() if key[0] in GAUGES}
    totals = {
        # A series that falls has lost the process that wrote it.
        key: max(0.0, value - before.values.get(key, 0.0))
        for key, value in after.values.items()
        if key[0] not in GAUGES
    }
    latencies = {
        name: _in_buckets(before.buckets.get(name, {}), bounds)
        for name, bounds in after.buckets.items()
    }
    return Change(after.time_s, after.time_s - before.time_s, totals, gauges, latencies)


def _in_buckets(before: Mapping[float, float], after: Mapping[float, float]) -> Latencies:
    bounds = sorted(after)
    rising = [after[bound] - before.get(bound, 0.0) for bound in bounds]
    counts = (max(0.0, upto - below) for below, upto in zip([0.0, *rising], rising, strict=False))
    return Latencies(tuple(bounds[:-1]), tuple(counts))


def merge(changes: Iterable[Change]) -> Change:
    """One change over all of them, the oldest first; gauges are the newest.

    Raises ValueError without any.
    """
    found = list(changes)
    if not found:
        raise ValueError("nothing to merge")
    totals: dict[Key, float] = {}
    latencies: dict[str, Latencies] = {}
    for one in found:
        for key, value in one.totals.items():
            totals[key] = totals.get(key, 0.0) + value
        for name, some in one.latencies.items():
            latencies[name] = latencies[name].plus(some) if name in latencies else some
    span_s = sum(one.span_s for one in found)
    return Change(found[-1].time_s, span_s, totals, found[-1].gauges, latencies)
