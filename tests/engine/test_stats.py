"""The engine's figures: they add up on the way, and every one is exported as declared."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from conserve.engine.connector import ConserveConnector
from conserve.engine.series import BY_NAME, LABEL_VALUES, LATENCY_BUCKETS, METRICS, Metric
from conserve.engine.stats import EngineStats, send_with
from conserve.metrics.machine_targets import rounded_up

pytestmark = pytest.mark.engine

LABELS = ["model_name", "engine"]
VALUES: dict[int, list[object]] = {0: ["smol", "0"], 1: ["smol", "1"]}
TARGETS = {"conserve": {"slo_ttft_s": 0.8, "slo_tbt_s": 0.11}}
IDLE = {
    "ttft_target_seconds": 0.8,
    "tbt_target_seconds": 0.11,
    "harvest_budget_ratio": 1.0,
    **dict.fromkeys(("waiting_requests", "running_requests", "kv_blocks", "kv_usage_ratio"), 0.0),
}
SUFFIX: dict[type, str] = {Counter: "_total", Gauge: "", Histogram: "_sum"}


def one_of_each(metric: Metric, stats: EngineStats, value: float) -> None:
    label = "some" if metric.label else ""
    if metric.kind is Counter:
        stats.count(metric.name, value, label)
    elif metric.kind is Gauge:
        stats.set(metric.name, value, label)
    else:
        stats.observe(metric.name, value, label)


def test_counters_add_gauges_keep_the_newest_histograms_keep_all() -> None:
    total = EngineStats()
    for value in (1.0, 2.5):
        newer = EngineStats()
        for metric in METRICS:
            one_of_each(metric, newer, value)
        assert total.aggregate(newer) is total
    expected: dict[type, Any] = {Counter: 3.5, Gauge: 2.5, Histogram: [1.0, 2.5]}
    for metric in METRICS:
        label = "some" if metric.label else ""
        assert total.data[metric.name] == {label: expected[metric.kind]}


def test_labels_are_kept_apart() -> None:
    one, other = EngineStats(), EngineStats()
    one.count("output_tokens", 1, "online")
    other.count("output_tokens", 5, "offline")
    other.count("output_tokens", 2, "online")
    one.aggregate(other)
    assert one.data == {"output_tokens": {"online": 3.0, "offline": 5.0}}
    assert other.data["output_tokens"]["online"] == 2, "the other is not touched"


def test_aggregated_histograms_do_not_share_lists() -> None:
    one, other = EngineStats(), EngineStats()
    other.observe("step_seconds", 0.5)
    one.aggregate(other)
    one.observe("step_seconds", 0.7)
    assert other.data == {"step_seconds": {"": [0.5]}}


def test_figures_travel_as_plain_data() -> None:
    stats = EngineStats()
    assert stats.is_empty()
    stats.observe("ttft_seconds", 0.25, "online")
    assert not stats.is_empty()
    carried = pickle.loads(pickle.dumps(stats.to_dict()))
    arrived = ConserveConnector.build_kv_connector_stats(carried)
    assert arrived.data == stats.data
    assert ConserveConnector.build_kv_connector_stats(None).is_empty()
    stats.reset()
    assert stats.is_empty()
    assert arrived.data == {"ttft_seconds": {"online": [0.25]}}


def test_the_log_line_shows_what_an_operator_asks_for() -> None:
    stats = EngineStats()
    assert stats.reduce() == {}
    stats.count("output_tokens", 41, "offline")
    stats.count("stopped_steps")
    stats.set("latency_model_error_ratio", 0.03456)
    stats.observe("tbt_seconds", 0.1, "online")
    assert stats.reduce() == {
        "output_tokens offline": 41,
        "stopped_steps": 1,
        "latency model error": 0.035,
    }


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def exporter(registry: CollectorRegistry, settings: dict[str, Any] = TARGETS) -> Any:
    """As vLLM builds it in the API process, into a registry of our own."""

    def into(kind: type) -> Any:
        return lambda **options: kind(registry=registry, **options)

    types: dict[Any, Any] = {kind: into(kind) for kind in (Counter, Gauge, Histogram)}
    config = SimpleNamespace(kv_transfer_config=None, additional_config=settings)
    return ConserveConnector.build_prom_metrics(config, types, LABELS, VALUES)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_exported(registry: CollectorRegistry, metric: Metric) -> None:
    export = exporter(registry)
    stats = EngineStats()
    one_of_each(metric, stats, 2.0)
    export.observe(stats.data, engine_idx=1)
    export.observe(stats.data, engine_idx=1)
    labels = {"model_name": "smol", "engine": "1"}
    if metric.label:
        labels[metric.label] = "some"
    value = registry.get_sample_value(f"conserve:{metric.name}{SUFFIX[metric.kind]}", labels)
    assert value == (2.0 if metric.kind is Gauge else 4.0)


def test_what_is_counted_is_zero_from_the_start(registry: CollectorRegistry) -> None:
    """A rate needs a first value; what a gauge will say is not known yet, but for the targets and
    what an idle engine holds and would take: routers decide by that."""
    exporter(registry)
    labels = {"model_name": "smol", "engine": "1"}
    for metric in METRICS:
        for value in LABEL_VALUES[metric.label]:
            own = labels | {metric.label: value} if metric.label else labels
            known = registry.get_sample_value(f"conserve:{metric.name}{SUFFIX[metric.kind]}", own)
            assert known == (IDLE.get(metric.name) if metric.kind is Gauge else 0.0), metric.name


def test_figures_that_come_late_go_with_the_same_outputs() -> None:
    early, late = EngineStats(), EngineStats()
    early.count("steps", 1, "offline")
    early.set("running_requests", 3, "offline")
    late.count("steps", 1, "offline")
    late.set("running_requests", 0, "offline")
    carrier = SimpleNamespace(scheduler_stats=SimpleNamespace(kv_connector_stats=early.to_dict()))
    send_with({0: SimpleNamespace(scheduler_stats=None), 1: carrier}, late)
    assert carrier.scheduler_stats.kv_connector_stats == {
        "steps": {"offline": 2.0},
        "running_requests": {"offline": 0},
    }
    send_with({0: SimpleNamespace(scheduler_stats=None)}, late)  # nobody collects: no error


def test_every_family_has_its_help_and_kind(registry: CollectorRegistry) -> None:
    exporter(registry)
    families = {family.name: family for family in registry.collect()}
    assert set(families) == {f"conserve:{metric.name}" for metric in METRICS}
    for metric in METRICS:
        family = families[f"conserve:{metric.name}"]
        assert family.documentation == metric.help
        assert family.type == metric.kind.__name__.lower()
        assert metric.help.endswith(".")


def test_histograms_have_latency_buckets(registry: CollectorRegistry) -> None:
    export = exporter(registry)
    stats = EngineStats()
    stats.observe("step_seconds", 0.04)
    export.observe(stats.data)
    labels = {"model_name": "smol", "engine": "0"}
    for bound, count in ((0.03, 0.0), (0.05, 1.0)):
        assert bound in LATENCY_BUCKETS
        name = "conserve:step_seconds_bucket"
        assert registry.get_sample_value(name, labels | {"le": str(bound)}) == count


@pytest.mark.parametrize("name", ["stop_response_seconds", "step_seconds", "copy_wait_seconds"])
def test_a_millisecond_is_told_from_four(registry: CollectorRegistry, name: str) -> None:
    """A GPU stops within a layer, and a step of a small model takes no five milliseconds there."""
    stats = EngineStats()
    for seconds in (0.0008, 0.0014, 0.0024, 0.0038):
        stats.observe(name, seconds)
    exporter(registry).observe(stats.data)
    labels = {"model_name": "smol", "engine": "0"}
    upto = [
        registry.get_sample_value(f"conserve:{name}_bucket", labels | {"le": le})
        for le in ("0.001", "0.002", "0.003", "0.004")
    ]
    assert upto == [1.0, 2.0, 3.0, 4.0]


def test_each_target_is_a_bound(registry: CollectorRegistry) -> None:
    stats = EngineStats()
    stats.observe("ttft_seconds", 0.81, "online")
    exporter(registry).observe(stats.data)
    labels = {"model_name": "smol", "engine": "0", "class": "online"}
    name = "conserve:ttft_seconds_bucket"
    counts = [registry.get_sample_value(name, labels | {"le": le}) for le in ("0.11", "0.8", "1.0")]
    assert counts == [0.0, 0.0, 1.0]


def test_targets_of_the_machine_come_when_they_are_known(registry: CollectorRegistry) -> None:
    export = exporter(registry, {})
    name, where = "conserve:tbt_target_seconds", {"model_name": "smol", "engine": "0"}
    assert registry.get_sample_value(name, where) is None
    export.observe({"tbt_target_seconds": {"": 0.075}})
    assert registry.get_sample_value(name, where) == 0.075


def test_a_machines_targets_are_bounds() -> None:
    of_machines = {rounded_up(ms / 1000) for ms in range(75, 10_000)}
    assert of_machines <= set(LATENCY_BUCKETS)


def test_names_are_unique_and_histograms_carry_their_unit() -> None:
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        if metric.kind is Histogram:
            assert metric.name.endswith(("_seconds", "_layers"))


def test_a_figure_nobody_declared_is_refused(registry: CollectorRegistry) -> None:
    """The negative control: a misspelt name is not exported in silence."""
    stats = EngineStats()
    stats.count("dropped_tokns")
    with pytest.raises(KeyError):
        exporter(registry).observe(stats.data)
    with pytest.raises(KeyError):
        EngineStats().aggregate(stats)
