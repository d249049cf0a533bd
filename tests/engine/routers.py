"""The rules by which routers, gates and autoscalers judge a replica, from its /metrics text alone.

Each is written anew from what its project publishes, named beside it; weights are those of the
projects' default configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client.parser import text_string_to_metric_families

Load = Mapping[str, float]
"""Name of a series, or name{class=...} -> its value, of one replica."""
WAITING, RUNNING = "vllm:num_requests_waiting", "vllm:num_requests_running"
KV_USAGE = "vllm:kv_cache_usage_perc"
"""What llm-d-router's core-metrics-extractor reads by default of an engine `vllm` (extractor/
metrics/factories.go); the endpoint picker of the gateway API's inference extension began with the
same three."""


def scrape(text: str, engine: str) -> Load:
    """What a reader finds of one replica; without its label, the sum over a series' classes."""
    load: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("engine") == engine:
                load[sample.name] = load.get(sample.name, 0.0) + sample.value
                if found := sample.labels.get("class"):
                    load[f"{sample.name}{{class={found}}}"] = sample.value
    return load


def fewest_of(name: str) -> Callable[[Mapping[str, Load]], dict[str, float]]:
    """llm-d-router, scorer/queuedepth/queue.go and scorer/runningrequests/runningrequest.go:
    (most - own) / (most - fewest), and 1 for all where they are equal."""

    def scores(replicas: Mapping[str, Load]) -> dict[str, float]:
        values = [load[name] for load in replicas.values()]
        least, most = min(values), max(values)
        if least == most:
            return dict.fromkeys(replicas, 1.0)
        return {one: (most - load[name]) / (most - least) for one, load in replicas.items()}

    return scores


def kv_scores(replicas: Mapping[str, Load], usage: str = KV_USAGE) -> dict[str, float]:
    """llm-d-router, scorer/kvcacheutilization/kvcache_utilization.go: what is not used."""
    return {name: 1.0 - load[usage] for name, load in replicas.items()}


def load_aware_scores(replicas: Mapping[str, Load], threshold: float = 128) -> dict[str, float]:
    """llm-d-router, scorer/loadaware/load_aware.go: one half, less the share of the threshold that
    waits."""
    return {
        name: 0.5 * (1.0 - min(load[WAITING], threshold) / threshold)
        for name, load in replicas.items()
    }


def picked(replicas: Mapping[str, Load], waiting: str = WAITING, usage: str = KV_USAGE) -> str:
    """The endpoint picker's choice by load: both scorers weigh 2 in its default profile. The names
    of what they read are its `engineConfigs`."""
    queue, memory = fewest_of(waiting)(replicas), kv_scores(replicas, usage)
    return max(replicas, key=lambda name: 2 * queue[name] + 2 * memory[name])


def saturation(load: Load, queue_threshold: float = 5, kv_threshold: float = 0.8) -> float:
    """llm-d-router, saturationdetector/utilization/detector.go: of a pod; from 1 on it takes no
    more."""
    return max(load[WAITING] / queue_threshold, load[KV_USAGE] / kv_threshold)


def scraped_budget(load: Load, metric: str, max_count: float = 0, baseline: float = 0.0) -> float:
    """llm-d-async, gate `endpoint-scrape`: 1 - saturation - baseline, from 0 to 1."""
    saturated = load[metric] / max_count if max_count else load[metric]
    return min(1.0, max(0.0, 1.0 - saturated - baseline))


def queried_budget(value: float) -> float:
    """llm-d-async, gate `prometheus-query`: what the user's expression says, from 0 to 1."""
    return min(1.0, max(0.0, value))


def keda_replicas(loads: Mapping[str, Load], threshold: float = 5) -> int:
    """KEDA's `prometheus` trigger in production-stack (tutorials/assets/keda-scaled-object.yaml):
    requests that wait, a threshold of 5 for each replica."""
    waiting = sum(load[WAITING] for load in loads.values())
    return max(1, -(-int(waiting) // int(threshold)))
