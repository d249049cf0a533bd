"""What a server's /metrics says of its load, for autoscaling."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from conserve.ray.autoscaling import ONLINE, WORKERS_NEEDED

REQUESTS = ("conserve:running_requests", "conserve:waiting_requests")
WORKERS = "conserve:batch_workers_needed"


def autoscaling_stats(text: str) -> dict[str, float]:
    """Of the text of /metrics. A server that serves no batches needs no workers for them."""
    found = {ONLINE: 0.0, WORKERS_NEEDED: 0.0}
    lines = [line for line in text.splitlines() if line.startswith((*REQUESTS, WORKERS))]
    for family in text_string_to_metric_families("\n".join([*lines, ""])):
        for sample in family.samples:
            if sample.name in REQUESTS and sample.labels.get("class") == "online":
                found[ONLINE] += sample.value
            elif sample.name == WORKERS:
                found[WORKERS_NEEDED] = max(found[WORKERS_NEEDED], sample.value)
    return found
