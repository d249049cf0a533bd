"""The engine's figures: collected by the scheduler, carried to the API process, exported there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from conserve.engine.door import KVConnectorPromMetrics, KVConnectorStats
from conserve.engine.series import BY_NAME, LABEL_VALUES, LATENCY_BUCKETS, METRICS, Metric
from conserve.engine.settings import EngineSettings


class EngineStats(KVConnectorStats):  # type: ignore[misc]
    """Figures since the last hand-over: metric name -> label value -> number(s).

    Counters add up, gauges keep the newest, histograms keep every observation.
    """

    def count(self, name: str, amount: float = 1.0, label: str = "") -> None:
        series = self.data.setdefault(name, {})
        series[label] = series.get(label, 0.0) + amount

    def observe(self, name: str, value: float, label: str = "") -> None:
        self.data.setdefault(name, {}).setdefault(label, []).append(value)

    def set(self, name: str, value: float, label: str = "") -> None:
        self.data.setdefault(name, {})[label] = value

    data: dict[str, dict[str, Any]]

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data

    def take(self) -> EngineStats | None:
        """What has come together so far, if anything; nothing of it stays."""
        if self.is_empty():
            return None
        taken = EngineStats(data=self.data)
        self.reset()
        return taken

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, label, value in other.items():
            kind = BY_NAME[name].kind
            if kind is Counter:
                self.count(name, value, label)
            elif kind is Gauge:
                self.set(name, value, label)
            else:
                self.data.setdefault(name, {}).setdefault(label, []).extend(value)
        return self

    def items(self) -> Iterator[tuple[str, str, Any]]:
        for name, series in self.data.items():
            for label, value in series.items():
                yield name, label, value

    def reduce(self) -> dict[str, int | float]:
        """What vLLM's periodic log line shows."""
        shown: dict[str, int | float] = {}
        for name in ("output_tokens", "displaced_requests", "stopped_steps", "dropped_tokens"):
            for label, value in self.data.get(name, {}).items():
                shown[f"{name} {label}".strip()] = round(value)
        for label, value in self.data.get("latency_model_error_ratio", {}).items():
            shown[f"latency model error {label}".strip()] = round(value, 3)
        return shown


def send_with(outputs: dict[int, Any], late: EngineStats | None) -> None:
    """Add `late` to the figures that a step's outputs (vLLM's, by client) already carry; where
    none carries any, vLLM was told to collect nothing."""
    for output in outputs.values():
        if late is not None and output.scheduler_stats is not None:
            sent = EngineStats(data=output.scheduler_stats.kv_connector_stats or {})
            output.scheduler_stats.kv_connector_stats = sent.aggregate(late).to_dict()
            return


class PromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """`conserve:*` on the API process's /metrics."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        settings = EngineSettings.of(vllm_config.additional_config)
        named = {
            "ttft_target_seconds": settings.slo_ttft_s,
            "tbt_target_seconds": settings.slo_tbt_s,
        }
        self._named = {name: seconds for name, seconds in named.items() if seconds}
        """Targets that the engine takes from the machine come with its first figures."""
        self._series: dict[str, Any] = {
            metric.name: self._register(metric, metric_types[metric.kind], labelnames)
            for metric in METRICS
        }
        for engine in per_engine_labelvalues:
            self._begin(engine)
            self.observe({name: {"": seconds} for name, seconds in self._named.items()}, engine)

    def _begin(self, engine: int) -> None:
        """Counters and histograms exist from the start, at zero: a rate needs a first value. A
        gauge appears when it is known."""
        for metric in METRICS:
            if metric.kind is Gauge and metric.idle is None:
                continue
            for value in LABEL_VALUES.get(metric.label, ()):
                series = self._labelled(metric.name, engine, value)
                if metric.idle is not None:
                    series.set(metric.idle)

    def _register(self, metric: Metric, cls: type, labelnames: list[str]) -> Any:
        options: dict[str, Any] = {}
        if metric.kind is Histogram:
            bounds = (
                {*metric.buckets, *self._named.values()}
                if metric.buckets is LATENCY_BUCKETS
                else metric.buckets
            )
            options["buckets"] = sorted(bounds)
        if metric.kind is Gauge:
            options["multiprocess_mode"] = "mostrecent"
        labels = [*labelnames, metric.label] if metric.label else labelnames
        return cls(
            name=f"conserve:{metric.name}",
            documentation=metric.help,
            labelnames=labels,
            **options,
        )

    def _labelled(self, name: str, engine: int, label: str) -> Any:
        own = [label] if BY_NAME[name].label else []
        return self._series[name].labels(*self.per_engine_labelvalues[engine], *own)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, label, value in EngineStats(data=transfer_stats_data).items():
            series = self._labelled(name, engine_idx, label)
            kind = BY_NAME[name].kind
            if kind is Counter:
                series.inc(value)
            elif kind is Gauge:
                series.set(value)
            else:
                for one in value:
                    series.observe(one)
